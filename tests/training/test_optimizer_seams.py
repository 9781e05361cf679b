"""What some optimizers ask of the loop: averaged weights around evaluation and saving, and Hessian estimates."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.schedulefree_adamw import ScheduleFreeAdamW
from frankenstein.optimizers.sophia import Sophia
from frankenstein.training.mlm import MlmBatch, MlmObjective, mlm_loss, sampled_loss
from frankenstein.training.options import OptimizerOptions
from tests.training.tiny_language import pretrain_tiny, write_language
from tests.training.training_standin import Regression, build_net, trainer


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


class Interrupted(Regression):
    def batch(self, step: int, micro: int) -> dict:
        if step == 13:
            raise KeyboardInterrupt
        return super().batch(step, micro)


def schedule_free(folder: Path, objective: Regression | None = None, **settings: Any) -> Any:
    net = build_net()
    return trainer(folder, objective, net=net, optimizer=ScheduleFreeAdamW(net.parameters(), lr=0.05), **settings)


def test_schedule_free_equals_a_loop_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = schedule_free(tmp_path)
        history = run.run()
    assert "ScheduleFreeAdamW keeps its learning rate; scheduler_type is not applied" in caplog.text
    assert {row["learning_rate"] for row in history} == {0.05}
    net, data = build_net(), Regression()
    optimizer = ScheduleFreeAdamW(net.parameters(), lr=0.05)
    torch.manual_seed(7)
    for step in range(20):
        optimizer.zero_grad()
        data.loss(net, data.batch(step, 0))[0].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    training = build_net()
    training.load_state_dict(net.state_dict())
    optimizer.eval()
    assert_equal(run.model, net)
    assert not torch.equal(net.first.weight, training.first.weight)
    net.eval()
    assert history[-1]["valid_loss"] == pytest.approx(data.validate(net)["loss"], rel=1e-6)


def test_checkpoints_and_the_result_hold_the_averaged_weights(tmp_path: Path) -> None:
    run = schedule_free(tmp_path)
    run.run()
    for tier in ("rolling", "best"):
        saved = load_file(tmp_path / "f" / f"{tier}-00000020" / "model.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in run.model.state_dict().items())


def test_a_killed_schedule_free_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        schedule_free(tmp_path / "b", Interrupted()).run()
    straight, resumed = (schedule_free(tmp_path / name) for name in "ab")
    assert straight.run() == resumed.run()
    assert_equal(straight.model, resumed.model)
    again = schedule_free(tmp_path / "b", Interrupted())
    again.run()
    assert_equal(again.model, straight.model)


def test_looking_at_the_average_changes_no_training_weight(tmp_path: Path) -> None:
    often, seldom = (
        schedule_free(tmp_path / str(n), eval_every_n_steps=n, checkpoint_every_n_steps=n) for n in (1, 20)
    )
    for run in (often, seldom):
        run.run()
    assert_equal(often.model, seldom.model)


class Classes(Regression):
    """Four classes; counts which loss was asked for."""

    def __init__(self) -> None:
        super().__init__(sizes=(8, 5))
        self.asked: list[tuple[int, ...] | None] = []

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        self.asked.append(None)
        return super().loss(model, batch)

    def sampled_loss(
        self, model: nn.Module, batch: dict[str, Any], seed: tuple[int, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.asked.append(seed)
        generator = torch.Generator().manual_seed(sum(seed))
        prediction = model(batch["x"])
        drawn = prediction.detach() + torch.randn(prediction.shape, generator=generator)
        loss, values = super().loss(model, batch)
        return (prediction - drawn).square().mean(), {**values, "loss": loss.detach()}


def sophia(folder: Path, objective: Regression, **settings: Any) -> Any:
    net = build_net(0.0)
    optimizer = Sophia(net.parameters(), lr=0.01, rho=0.1, update_k=3)
    return trainer(folder, objective, net=net, optimizer=optimizer, gradient_accumulation_steps=2, **settings)


def test_every_kth_step_of_sophia_estimates_and_moves_nothing(tmp_path: Path) -> None:
    data = Classes()
    run = sophia(tmp_path, data, steps=7, scheduler_type="constant")
    history = run.run()
    expected = [(7, step, micro) if step % 3 == 2 else None for step in range(7) for micro in range(2)]
    assert data.asked == expected
    assert run.state.hessian_terms == 13

    net, again = build_net(0.0), Classes()
    optimizer = Sophia(net.parameters(), lr=0.01, rho=0.1, update_k=3)
    for step in range(7):
        optimizer.zero_grad()
        for micro in range(2):
            batch = again.batch(step, micro)
            loss, values = again.sampled_loss(net, batch, (7, step, micro)) if step % 3 == 2 else again.loss(net, batch)
            (loss * values["terms"]).backward()
        for p in net.parameters():
            assert p.grad is not None
            p.grad.div_(13.0)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if step % 3 == 2:
            optimizer.update_hessian()
        elif step < 2:
            optimizer.step()
        else:
            optimizer.step(bs=13)
    assert_equal(run.model, net)
    assert all(row["loss"] is not None and row["loss"] < 20 for row in history)  # of the true labels in every step


def test_a_killed_sophia_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    class Killed(Classes):
        def batch(self, step: int, micro: int) -> dict:
            if step == 13:
                raise KeyboardInterrupt
            return super().batch(step, micro)

    with pytest.raises(KeyboardInterrupt):
        sophia(tmp_path / "b", Killed()).run()
    straight, resumed = (sophia(tmp_path / name, Classes()) for name in "ab")
    assert straight.run() == resumed.run() and straight.state == resumed.state
    assert_equal(straight.model, resumed.model)


def test_an_objective_without_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FrankensteinError, match="Regression has no labels to sample, which this optimizer needs"):
        sophia(tmp_path, Regression((8, 8))).run()


class Logits(nn.Module):
    """An encoder whose logits are its weights: every position has the same distribution."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids: Tensor, mask: Tensor | None, at: Tensor) -> Tensor:
        return self.logits.expand(len(at), -1)

    def mlm_logits(self, rows: Tensor) -> Tensor:
        return rows

    def losses(self) -> dict[str, Tensor]:
        return {"balance": self.logits.sum()}


def constant_batch(count: int) -> MlmBatch:
    ids = torch.zeros(1, count, dtype=torch.int64)
    return MlmBatch(ids, None, torch.arange(count), torch.full((count,), 2), count)


def test_sampled_labels_follow_the_model_and_the_seed() -> None:
    model, batch = Logits([0.5, 0.3, 0.15, 0.05]), constant_batch(20_000)
    losses = [sampled_loss(model, batch, (3, 4, micro))[0] for micro in (0, 1, 0)]
    assert torch.equal(losses[0], losses[2]) and not torch.equal(losses[0], losses[1])
    losses[0].backward()
    # The gradient of the mean loss is p - share of each drawn label, which is near 0 but not 0.
    assert model.logits.grad is not None
    assert 0 < model.logits.grad.abs().max() < 4 * (0.25 / 20_000) ** 0.5
    entropy = -(model.logits.exp() * model.logits).sum()
    assert losses[0].item() == pytest.approx(entropy.item(), rel=0.02)


def test_the_logged_values_are_those_of_the_true_labels_and_the_global_generator_is_left_alone() -> None:
    model, batch = Logits([0.5, 0.3, 0.15, 0.05]), constant_batch(64)
    state = torch.get_rng_state()
    _, values = sampled_loss(model, batch, (1,))
    assert torch.equal(torch.get_rng_state(), state)
    loss, true = mlm_loss(model, batch)
    assert values["loss"].item() == loss.item() == pytest.approx(F.cross_entropy(model.logits, torch.tensor(2)).item())
    assert {name: values[name].item() for name in true} == {name: value.item() for name, value in true.items()}


def test_the_expected_square_of_the_estimate_is_the_diagonal_of_the_hessian() -> None:
    """E[N ghat^2] = p (1 - p), the Gauss-Newton diagonal of softmax cross-entropy, N terms in the mean."""
    model, count = Logits([0.5, 0.3, 0.15, 0.05]), 50
    squares = []
    for draw in range(400):
        model.zero_grad()
        sampled_loss(model, constant_batch(count), (9, draw))[0].backward()
        assert model.logits.grad is not None
        squares.append(count * model.logits.grad**2)
    p = model.logits.detach().exp()
    torch.testing.assert_close(torch.stack(squares).mean(0), p * (1 - p), rtol=0.25, atol=0.0)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    write_language(folder)
    return folder


@pytest.fixture
def torch_settings() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize("name", ["sophia", "schedulefree_adamw", "muon", "galore"])
def test_an_encoder_pretrains_and_resumes_to_the_same_bytes(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings: dict[str, Any] = {"optimizer": OptimizerOptions(name, {"sophia-update_k": 3} if name == "sophia" else {})}
    if name == "galore":
        settings = {"use_galore": True, "galore_rank": 8, "galore_update_interval": 3}
    pretrain_tiny(language, tmp_path / "a", csv_log_path=str(tmp_path / "log.csv"), **settings)
    batch = MlmObjective.batch

    def interrupted(self: MlmObjective, step: int, micro: int) -> Any:
        if step == 10:
            raise KeyboardInterrupt
        return batch(self, step, micro)

    monkeypatch.setattr(MlmObjective, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain_tiny(language, tmp_path / "b", csv_log_path=str(tmp_path / "log.csv"), **settings)
    monkeypatch.undo()
    metrics = pretrain_tiny(language, tmp_path / "b", csv_log_path=str(tmp_path / "log.csv"), **settings)
    assert metrics["valid_loss"] < 3.1 and metrics["ended_by"] == "steps"
    for file in ("encoder/model.safetensors", "metrics.json", "curve.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
