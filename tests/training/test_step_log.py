import csv
import itertools
from pathlib import Path

import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.training import readings
from frankenstein.training.step_log import StepLog
from frankenstein.training.telemetry import COLUMNS, GRADIENT_COLUMNS, gradient_columns, memory_columns
from tests.training.training_standin import Regression, no_file_over, trainer


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_columns_are_those_of_table_5_and_the_announced_ones() -> None:
    table_5 = "timestamp epoch step global_step loss accuracy learning_rate grad_norm scaler_scale"
    memory = "gpu_memory_gb gpu_cached_gb tokens_per_s masked_tokens mfu peak_memory_gb"
    assert " ".join(COLUMNS) == f"{table_5} {memory}"


def test_a_run_logs_every_step(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "run.csv"
    history = trainer(tmp_path, log=log, steps=6, telemetry_log_interval=3, steps_per_epoch=4).run()
    found = rows(log)
    assert [r["global_step"] for r in found] == ["1", "2", "3", "4", "5", "6"]
    assert [(r["epoch"], r["step"]) for r in found] == [
        ("0", "1"),
        ("0", "2"),
        ("0", "3"),
        ("0", "4"),
        ("1", "1"),
        ("1", "2"),
    ]
    assert [float(r["loss"]) for r in found] == pytest.approx([h["loss"] for h in history], rel=1e-6)
    assert {r["masked_tokens"] for r in found} == {"8"}
    assert all(float(r["tokens_per_s"]) > 0 and r["scaler_scale"] == "1" for r in found)
    assert [bool(r["peak_memory_gb"]) for r in found] == [False, False, True] * 2
    assert found[0]["timestamp"].endswith("+00:00")


def test_throughput_is_that_of_the_steps_since_the_last_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that ticks once a look: every step takes the same time, validation and checkpoints are left out."""
    ticks = itertools.count()
    monkeypatch.setattr(readings.time, "perf_counter", lambda: float(next(ticks)))
    trainer(tmp_path, log=tmp_path / "run.csv", eval_every_n_steps=4).run()
    assert {float(r["tokens_per_s"]) for r in rows(tmp_path / "run.csv")[1:]} == {32 / 2}


def test_gradient_statistics_get_their_own_columns_at_their_interval(tmp_path: Path) -> None:
    trainer(tmp_path, log=tmp_path / "run.csv", steps=4, log_gradient_stats=True, gradient_log_interval=2).run()
    found = rows(tmp_path / "run.csv")
    assert tuple(found[0]) == COLUMNS + GRADIENT_COLUMNS
    assert [bool(r["grad_abs_mean"]) for r in found] == [False, True, False, True]
    assert all(float(r["grad_norm"]) <= 1.0 <= 1e-6 + max(1.0, float(r["grad_norm_before_clip"])) for r in found)


def test_gradient_statistics_by_hand() -> None:
    found = gradient_columns([torch.tensor([[1.0, -3.0], [0.0, 0.0]]), torch.tensor([2.0])])
    assert {k: v.item() for k, v in found.items()} == pytest.approx(
        {"grad_abs_mean": 6 / 5, "grad_abs_max": 3.0, "grad_zero_share": 2 / 5}
    )


def test_peak_memory_is_that_of_the_process() -> None:
    columns = memory_columns(torch.device("cpu"))
    assert 0.05 < columns["peak_memory_gb"] < 100
    assert columns["gpu_memory_gb"] == columns["gpu_cached_gb"] == 0


def test_a_resumed_log_drops_the_steps_that_are_done_again_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    log = StepLog(path, ["global_step", "loss"], done=0, rotate=True)
    for step in (1, 2, 3):
        log.write({"global_step": step, "loss": 0.1 * step, "unknown": 1})
    with path.open("a") as stream:
        stream.write("4")
    StepLog(path, ["global_step", "loss"], done=2, rotate=True).write({"global_step": 3, "loss": 0.5})
    assert path.read_text() == "global_step,loss\n1,0.1\n2,0.2\n3,0.5\n"


def test_a_fresh_run_starts_the_log_again(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    StepLog(path, ["global_step"], done=0, rotate=True).write({"global_step": 1})
    StepLog(path, ["global_step"], done=0, rotate=True)
    assert path.read_text() == "global_step\n"


def test_a_log_with_other_columns_is_moved_aside_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    for columns in (["global_step", "a"], ["global_step", "b"], ["global_step", "c"]):
        StepLog(path, columns, done=0, rotate=True)
    assert (tmp_path / "run.1.csv").read_text() == "global_step,a\n"
    assert (tmp_path / "run.2.csv").read_text() == "global_step,b\n"
    with pytest.raises(FrankensteinError, match=r"run\.csv: has the columns global_step, c; expected global_step, d\."):
        StepLog(path, ["global_step", "d"], done=0, rotate=False)


def test_an_interrupted_run_continues_its_log_without_duplicates(tmp_path: Path) -> None:
    class Interrupted(Regression):
        def batch(self, step: int, micro: int) -> dict:
            if step == 8:
                raise KeyboardInterrupt
            return super().batch(step, micro)

    log = tmp_path / "run.csv"
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Interrupted(), log).run()
    assert [r["global_step"] for r in rows(log)] == [str(s) for s in range(1, 9)]
    trainer(tmp_path, log=log).run()
    assert [r["global_step"] for r in rows(log)] == [str(s) for s in range(1, 21)]


def test_a_log_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "run.csv", ["global_step"], done=0, rotate=True)
    with no_file_over(20), pytest.raises(FrankensteinError, match=r"run\.csv: the step log could not be written: File"):
        for step in range(9):
            log.write({"global_step": step + 10})
