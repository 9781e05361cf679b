import json
from pathlib import Path

import pytest
import torch
from torch import nn

from frankenstein.artifact import open_folder
from frankenstein.optimizers.adamw import AdamW
from frankenstein.training import readings
from frankenstein.training.guard import TrainingStopped, clip_gradients, unstable
from frankenstein.training.loop import LoopSettings
from frankenstein.training.options import TrainingOptions
from frankenstein.training.schedules import lr_factor
from tests.training.training_standin import Regression, build_net, trainer


def test_the_loop_equals_one_written_by_hand(tmp_path: Path) -> None:
    net, objective = build_net(0.0), Regression()
    optimizer = AdamW(net.parameters(), lr=0.01)
    for step in range(20):
        optimizer.zero_grad()
        objective.loss(net, objective.batch(step, 0))[0].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 0.01 * lr_factor(step, total_steps=20, warmup_ratio=0.1, kind="cosine")
        optimizer.step()
    run = trainer(tmp_path, dropout=0.0)
    run.run()
    for a, b in zip(run.model.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulated_micro_batches_equal_one_big_batch_also_when_their_sizes_differ(tmp_path: Path) -> None:
    class Big(Regression):
        def batch(self, step: int, micro: int) -> dict:
            parts = [Regression((3, 9)).batch(step, m) for m in range(2)]
            return {k: torch.cat([p[k] for p in parts]) for k in ("x", "y")} | {"bad": False}

    small = trainer(tmp_path / "a", Regression((3, 9)), gradient_accumulation_steps=2, dropout=0.0)
    big = trainer(tmp_path / "b", Big(), dropout=0.0)
    rows = zip(small.run(), big.run(), strict=True)
    for a, b in rows:
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for p, q in zip(small.model.parameters(), big.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def parameters_with_gradients(*values: list[float]) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(v))) for v in values]
    for p, v in zip(parameters, values, strict=True):
        p.grad = torch.tensor(v)
    return parameters


def test_clipping_scales_to_the_norm_over_all_parameters() -> None:
    parameters = parameters_with_gradients([3.0, 0.0], [0.0, 4.0])
    norms = clip_gradients(parameters, 2.0)
    assert (norms.before.item(), norms.after.item()) == pytest.approx((5.0, 2.0))
    torch.testing.assert_close(parameters[0].grad, torch.tensor([1.2, 0.0]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 1.6]))


def test_small_gradients_and_clipping_off_change_nothing() -> None:
    for max_norm in (10.0, 0.0):
        parameters = parameters_with_gradients([3.0, 4.0])
        norms = clip_gradients(parameters, max_norm)
        assert norms.after.item() == norms.before.item() == 5.0
        assert parameters[0].grad is not None and parameters[0].grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("loss", "gradient", "threshold", "bad"),
    [(1, 1, 0, 0), (torch.nan, 1, 0, 1), (1, torch.inf, 0, 1), (1, torch.nan, 9, 1), (1, 10, 9, 1), (1, 10, 0, 0)],
)
def test_what_counts_as_unstable(loss: float, gradient: float, threshold: float, bad: int) -> None:
    norms = clip_gradients(parameters_with_gradients([float(gradient)]), 0.0)
    assert bool(unstable(torch.tensor(float(loss)), norms, threshold)) == bool(bad)


@pytest.mark.parametrize("interval", [1, 4])
def test_an_unstable_step_changes_no_weight_and_the_run_goes_on(tmp_path: Path, interval: int) -> None:
    run = trainer(tmp_path, Regression(bad_steps=(2, 7)), nan_check_interval=interval, checkpoint_every_n_steps=20)
    history = run.run()
    assert [row["step"] for row in history if row["loss"] is None] == [3, 8]
    assert run.state.unstable == 2 and run.state.step == 20
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_a_skipped_step_leaves_model_and_optimizer_as_they_were(tmp_path: Path) -> None:
    run = trainer(tmp_path, Regression(bad_steps=(0,)), steps=1)
    run.run()
    for p, q in zip(run.model.parameters(), build_net().parameters(), strict=True):
        assert torch.equal(p, q)
    assert not run.optimizer.state


def test_lasting_instability_stops_with_a_message_and_an_emergency_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, Regression(bad_steps=tuple(range(6, 20))), max_nan_retries=2)
    with pytest.raises(TrainingStopped) as caught:
        run.run()
    text = str(caught.value)
    assert text.startswith(
        "test: training stopped at step 9: loss nan, gradient norm nan (nan after clipping); 3 unstable"
    )
    folder = tmp_path / "f" / "emergency-00000008"
    assert "max_nan_retries allows 2. First not finite: the loss. State before the step, its batch and" in text
    assert text.endswith(f"notes.json: {folder}")
    notes = json.loads((folder / "notes.json").read_text())
    bad = ["first.weight", "first.bias", "last.weight", "last.bias"]
    assert notes["second_run"]["gradients_not_finite"] == bad
    assert notes["not_finite"] == [] and notes["values"]["loss"] == "nan"
    assert notes["batch"]["0.x"].startswith("(8, 4) torch.float32, ")
    assert list(notes["learning_rates"]) == ["0"] and notes["memory_gb"]["peak_memory_gb"] > 0
    assert open_folder(folder, "checkpoint")["step"] == 8


def test_no_retries_stop_at_the_first_unstable_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="stopped at step 1: "):
        trainer(tmp_path, Regression(bad_steps=(0,)), max_nan_retries=0).run()


@pytest.mark.parametrize("workers", [1, 2])
def test_background_batches_give_the_same_bits(tmp_path: Path, workers: int) -> None:
    a, b = trainer(tmp_path / "a"), trainer(tmp_path / "b", dataloader_workers=workers)
    assert a.run() == b.run()


def test_how_often_the_device_is_read_does_not_change_the_bits(tmp_path: Path) -> None:
    a, b = trainer(tmp_path / "a"), trainer(tmp_path / "b", nan_check_interval=7, checkpoint_every_n_steps=20)
    assert a.run() == b.run()


def test_validation_rows_stand_in_the_history_and_training_mode_returns(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=7, eval_every_n_steps=3)
    history = run.run()
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["step"] for row in history if "valid_loss" in row] == [3, 6, 7]
    assert set(history[0]) == {"step", "loss", "learning_rate", "grad_norm"}
    assert run.model.training
    run.model.eval()
    assert history[-1]["valid_loss"] == pytest.approx(Regression().validate(run.model)["loss"])


def test_long_runs_keep_a_bounded_number_of_history_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "HISTORY_ROWS", 10)
    run = trainer(tmp_path, steps=25, eval_every_n_steps=10)
    assert [row["step"] for row in run.run()] == sorted({*range(3, 25, 3), 10, 20, 25})


def test_amp_computes_in_bfloat16_and_keeps_float32_weights(tmp_path: Path) -> None:
    class Watch(Regression):
        seen: set[torch.dtype] = set()  # noqa: RUF012

        def loss(self, model: nn.Module, batch: dict) -> tuple:
            self.seen.add(model(batch["x"]).dtype)
            return super().loss(model, batch)

    run = trainer(tmp_path, Watch(), steps=3, amp=True)
    run.run()
    assert Watch.seen == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_every_group_follows_the_schedule_from_its_own_rate(tmp_path: Path) -> None:
    net = build_net()
    optimizer = AdamW([{"params": [net.first.weight]}, {"params": [net.last.weight], "lr": 0.5}], lr=0.1)
    settings = {"steps": 4, "scheduler_type": "linear_warmup_then_constant", "warmup_ratio": 1.0}
    run = trainer(tmp_path, net=net, optimizer=optimizer, **settings)
    history = run.run()
    assert [row["learning_rate"] for row in history] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert [g["lr"] for g in run.optimizer.param_groups] == pytest.approx([0.1, 0.5])


def test_loop_settings_take_every_field_from_the_training_section() -> None:
    options = TrainingOptions(scheduler_total_steps=9, max_nan_retries=5, use_amp=True, dataloader_workers=2)
    settings = LoopSettings.from_training(options, 3, steps_per_epoch=4)
    assert (settings.steps, settings.seed, settings.max_nan_retries, settings.amp) == (9, 3, 5, True)
    assert (settings.dataloader_workers, settings.steps_per_epoch) == (2, 4)
    half = LoopSettings.from_training(TrainingOptions(amp_dtype="float16", max_tokens=7, max_epoch_checkpoints=2), 0)
    assert (half.amp_dtype, half.max_tokens, half.max_epoch_checkpoints) == ("float16", 7, 2)
    defaults = LoopSettings.from_training(TrainingOptions(), 0)
    assert defaults == LoopSettings(steps=TrainingOptions().scheduler_total_steps), (
        "the defaults of the loop are those of the training section"
    )
