"""max_tokens and max_seconds end a run cleanly, and count what a resumed run has spent already."""

import itertools
import logging
import time
from pathlib import Path

import pytest
import torch

from frankenstein.quantization.options import QuantizeOptions
from frankenstein.training import loop
from frankenstein.training.options import TrainingOptions
from frankenstein.training.settings import LoopSettings
from frankenstein.training.ternary import quantize_encoder
from tests.training.tiny_language import pretrain_tiny, write_language
from tests.training.training_standin import Regression, build_net, trainer

TOKENS = 32  # of one step of the stand-in


class Interrupted(Regression):
    def batch(self, step: int, micro: int) -> dict:
        if step == 7:
            raise KeyboardInterrupt
        return super().batch(step, micro)


@pytest.mark.parametrize(("budget", "steps"), [(1, 1), (TOKENS, 1), (TOKENS + 1, 2), (12 * TOKENS, 12), (10**9, 20)])
def test_a_run_ends_with_the_first_step_that_uses_its_tokens_up(tmp_path: Path, budget: int, steps: int) -> None:
    run = trainer(tmp_path, max_tokens=budget)
    history = run.run()
    assert history[-1]["step"] == run.state.step == steps
    assert run.state.tokens == steps * TOKENS
    assert run.state.ended_by == ("steps" if steps == 20 else "max_tokens")
    assert "valid_loss" in history[-1]


def test_the_schedule_keeps_its_horizon_and_the_steps_are_those_of_the_whole_run(tmp_path: Path) -> None:
    short, whole = trainer(tmp_path / "a", max_tokens=12 * TOKENS).run(), trainer(tmp_path / "b").run()
    assert [{k: v for k, v in row.items() if "valid" not in k} for row in short[:-1]] == [
        {k: v for k, v in row.items() if "valid" not in k} for row in whole[:11]
    ]


def test_tokens_of_all_micro_batches_and_of_skipped_steps_count(tmp_path: Path) -> None:
    run = trainer(tmp_path, Regression((3, 9), bad_steps=(1,)), gradient_accumulation_steps=2, max_tokens=100)
    run.run()
    assert (run.state.step, run.state.tokens, run.state.unstable) == (3, 3 * 4 * 12, 1)


def test_a_resumed_run_ends_where_the_undisturbed_one_does(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", Interrupted(), max_tokens=9 * TOKENS).run()
    straight, resumed = (trainer(tmp_path / name, max_tokens=9 * TOKENS) for name in "ab")
    assert straight.run() == resumed.run() and straight.state == resumed.state
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    again = trainer(tmp_path / "b", Interrupted(), max_tokens=9 * TOKENS)
    assert again.run()[-1]["step"] == 9 and again.state == straight.state


def test_seconds_end_a_run_and_those_of_an_earlier_process_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(next(ticks)))
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Interrupted(), max_seconds=200.0, checkpoint_every_n_steps=6).run()
    spent = next(ticks)
    with caplog.at_level(logging.INFO):
        run = trainer(tmp_path, max_seconds=200.0, steps=10_000, checkpoint_every_n_steps=6)
        run.run()
    assert run.state.ended_by == "max_seconds" and 200 <= run.state.seconds < 220
    assert next(ticks) - spent < 198  # the first process had used some of them
    [ended] = [r.getMessage() for r in caplog.records if "used up" in r.getMessage()]
    step, tokens = run.state.step, run.state.tokens
    assert ended == f"test: max_seconds of 200.0 used up: ended at step {step} of 10000, after {tokens} tokens"
    assert (tmp_path / "f" / f"rolling-{step:08d}").is_dir()


def test_real_seconds_are_counted(tmp_path: Path) -> None:
    class Slow(Regression):
        def batch(self, step: int, micro: int) -> dict:
            time.sleep(0.02)
            return super().batch(step, micro)

    run = trainer(tmp_path, Slow(), max_seconds=0.1, steps=1000)
    run.run()
    assert run.state.ended_by == "max_seconds" and 1 <= run.state.step <= 5


def test_a_run_of_no_steps_does_nothing(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=0)
    assert run.run() == [] and run.state.ended_by == "steps"
    for p, q in zip(run.model.parameters(), build_net().parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_reproducible_limit_is_named_where_two_are_reached_at_once() -> None:
    settings = LoopSettings(steps=5, max_tokens=10, max_seconds=1.0)
    assert settings.ended_by(5, 10, 1.0) == "steps"
    assert settings.ended_by(4, 10, 1.0) == "max_tokens"
    assert settings.ended_by(4, 9, 1.0) == "max_seconds"
    assert settings.ended_by(4, 9, 0.9) == ""


def test_the_ternary_finish_takes_its_own_steps_whatever_the_budget_of_pretraining(tmp_path: Path) -> None:
    write_language(tmp_path)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        assert pretrain_tiny(tmp_path, tmp_path, max_tokens=60)["steps"] == 2
        options = TrainingOptions(batch_size=4, max_length=8, max_tokens=60, csv_log_path=str(tmp_path / "log"))
        quantize_encoder(
            seed=0, threads=1, options=QuantizeOptions(steps=3), training_options=options, encoder=tmp_path / "encoder",
            tokens=tmp_path / "tokens", out=tmp_path / "q", resume=tmp_path / "resume", metrics=tmp_path / "q.json",
            curve=tmp_path / "q.csv",
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    assert [line.split(",")[0] for line in (tmp_path / "q.csv").read_text().splitlines()] == ["step", "1", "2", "3"]
