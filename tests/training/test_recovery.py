"""Weights that are not finite are replaced by those of a checkpoint, and never reach one."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from frankenstein.optimizers.adamw import AdamW
from frankenstein.training.guard import TrainingStopped, not_finite
from tests.training.training_standin import Net, Regression, build_net, trainer


class Poisoned(Regression):
    """Spoils a number of the model or of its optimizer right before some steps, once each."""

    def __init__(self, spoil: Callable[[Net], None], *steps: int, again: bool = False) -> None:
        super().__init__()
        self.spoil, self.steps, self.again = spoil, list(steps), again

    def begin_step(self, model: Any, step: int) -> None:
        if step in self.steps:
            if not self.again:
                self.steps.remove(step)
            with torch.no_grad():
                self.spoil(model)


def bad_weight(net: Net) -> None:
    net.first.weight[0, 0] = torch.nan


def states(run: Any) -> list[torch.Tensor]:
    return [t for state in run.optimizer.state.values() for t in state.values()]


def test_a_bad_weight_is_replaced_by_the_newest_checkpoint_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, Poisoned(bad_weight, 13))
    with caplog.at_level(logging.WARNING):
        history = run.run()
    assert (run.state.step, run.state.unstable) == (20, 1)
    assert [row["step"] for row in history if row["loss"] is None] == [14]
    assert all(torch.isfinite(t).all() for t in [*run.model.parameters(), *states(run)])
    unstable, back = [r.getMessage() for r in caplog.records]
    assert unstable.startswith("test: step 14 is unstable: loss nan, ") and "1 of 3 retries used. First not" in unstable
    assert "first (Linear), output of call 1" in unstable and "own weights not finite" in unstable
    assert back == (
        "test: not finite after step 14: first.weight; weights and optimizer state are those of step 10 again, "
        "training goes on with the next batch"
    )


def test_weights_optimizer_and_position_are_those_of_the_algorithm(tmp_path: Path) -> None:
    """Steps 1-10, then steps 15-20 from there: written out by hand."""
    run = trainer(tmp_path, Poisoned(bad_weight, 13), dropout=0.0)
    run.run()
    net, data = build_net(0.0), Regression()
    optimizer = AdamW(net.parameters(), lr=0.01)
    rates = [row["learning_rate"] for row in trainer(tmp_path / "rates", dropout=0.0).run()]
    for step in (*range(10), *range(14, 20)):
        optimizer.zero_grad()
        data.loss(net, data.batch(step, 0))[0].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    for p, q in zip(run.model.parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_run_that_went_back_resumes_to_the_same_bits(tmp_path: Path) -> None:
    class Both(Poisoned):
        def batch(self, step: int, micro: int) -> dict:
            if step == 17:
                raise KeyboardInterrupt
            return super().batch(step, micro)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", Both(bad_weight, 13, again=True)).run()
    straight, resumed = (trainer(tmp_path / n, Poisoned(bad_weight, 13, again=True)) for n in "ab")
    assert straight.run() == resumed.run() and straight.state == resumed.state
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


class Flaky(AdamW):
    """Writes an Inf into the last bias in its step number `at`; nothing in the loss shows it before the next step."""

    at = 0
    calls = 0

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.calls += 1
        if self.calls == self.at:
            self.param_groups[0]["params"][-1].data.fill_(torch.inf)
        return result


@pytest.mark.parametrize("settings", [{}, {"steps_per_epoch": 10}, {"eval_every_n_steps": 5}])
def test_an_update_that_spoils_weights_reaches_no_checkpoint(tmp_path: Path, settings: dict) -> None:
    net = build_net()
    optimizer = Flaky(net.parameters(), lr=0.01)
    optimizer.at = 10  # right before a rolling checkpoint
    run = trainer(tmp_path, net=net, optimizer=optimizer, max_rolling_checkpoints=9, **settings)
    run.run()
    assert run.state.unstable == 1
    saved = sorted(p for p in (tmp_path / "f").iterdir() if not p.name.startswith("emergency"))
    assert len(saved) > 4
    for folder in saved:
        assert all(torch.isfinite(t).all() for t in load_file(folder / "model.safetensors").values()), folder
    first, later = (load_file(tmp_path / "f" / f"rolling-{s:08d}" / "model.safetensors") for s in (5, 10))
    assert all(torch.equal(first[name], later[name]) for name in first)
    notes = json.loads((tmp_path / "f" / "emergency-00000010" / "notes.json").read_text())
    assert notes["not_finite"] == ["last.bias"] and notes["step"] == 11


def test_a_spoilt_last_step_does_not_become_the_result(tmp_path: Path) -> None:
    net = build_net()
    optimizer = Flaky(net.parameters(), lr=0.01)
    optimizer.at = 20
    run = trainer(tmp_path, net=net, optimizer=optimizer)
    run.run()
    assert run.state.step == 20 and all(torch.isfinite(p).all() for p in run.model.parameters())


def test_a_bad_optimizer_state_counts_too(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=12)

    def spoil(_: Net) -> None:
        state = run.optimizer.state[run.model.first.weight]
        state["exp_avg"][0, 0] = torch.nan

    run.objective = run._run.objective = Poisoned(spoil, 8)  # seen before the checkpoint of step 10
    run.run()
    assert run.state.unstable == 1
    assert all(torch.isfinite(t).all() for t in [*run.model.parameters(), *states(run)])


def test_bad_weights_use_one_retry_however_seldom_the_device_is_read(tmp_path: Path) -> None:
    run = trainer(tmp_path, Poisoned(bad_weight, 12), nan_check_interval=10, max_nan_retries=1)
    history = run.run()
    assert run.state.unstable == 1 and [row["step"] for row in history if row["loss"] is None] == [13, 14, 15]


def test_the_gradients_of_the_weights_that_were_given_up_move_nothing(tmp_path: Path) -> None:
    """Steps 6 to 10 are read together: 7 is bad, 10 is good, but its optimizer state is not."""
    run = trainer(tmp_path, nan_check_interval=5, steps=10)

    def spoil(_: Net) -> None:
        run.optimizer.state[run.model.first.weight]["exp_avg"][0, 0] = torch.nan

    objective = Poisoned(spoil, 9)
    objective.bad_steps = (6,)
    run._run.objective = run.objective = objective
    run.run()
    assert run.state.unstable == 1
    first, last = (load_file(tmp_path / "f" / f"rolling-{s:08d}" / "model.safetensors") for s in (5, 10))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_going_back_uses_the_retries_up(tmp_path: Path) -> None:
    run = trainer(tmp_path, Poisoned(bad_weight, 7, 9, 13), max_nan_retries=2)
    with pytest.raises(TrainingStopped, match=r"stopped at step 14: .*; 3 unstable steps, max_nan_retries allows 2"):
        run.run()
    assert sorted(p.name for p in (tmp_path / "f").glob("rolling-*")) == ["rolling-00000005", "rolling-00000010"]


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped) as caught:
        trainer(tmp_path, Poisoned(bad_weight, 3)).run()
    assert str(caught.value) == (
        "test: training stopped at step 4: not finite: first.weight; "
        "there is no intact rolling checkpoint to go back to (checkpoint_every_n_steps: 5)"
    )


def test_a_bad_batch_alone_changes_no_weight_and_goes_back_to_none(tmp_path: Path) -> None:
    run = trainer(tmp_path, Regression(bad_steps=(12,)), dropout=0.0)
    run.run()
    net, data = build_net(0.0), Regression()
    optimizer = AdamW(net.parameters(), lr=0.01)
    rates = [row["learning_rate"] for row in trainer(tmp_path / "rates", dropout=0.0).run()]
    for step in (s for s in range(20) if s != 12):
        optimizer.zero_grad()
        data.loss(net, data.batch(step, 0))[0].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    for p, q in zip(run.model.parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_is_not_finite_is_named_with_its_state() -> None:
    net = nn.Linear(2, 2)
    optimizer = AdamW(net.parameters())
    assert not_finite(net.named_parameters(), optimizer) == []
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[net.bias]["exp_avg_sq"][0] = torch.inf
    assert not_finite(net.named_parameters(), optimizer) == ["bias (exp_avg_sq)"]
    with torch.no_grad():
        net.weight[0, 0] = torch.nan
    assert not_finite(net.named_parameters(), optimizer) == ["weight", "bias (exp_avg_sq)"]
