import logging
import sys

import pytest

from frankenstein.training.progress import Progress


def run(every: int) -> None:
    with Progress("pretrain", total=10, done=2, every=every) as progress:
        for step in range(3, 11):
            progress.update(step, {"loss": 1 / step})


def test_without_a_terminal_there_is_a_plain_line_every_n_steps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(every=4)
    assert [r.getMessage() for r in caplog.records] == [
        "pretrain: step 4/10 loss 0.25",
        "pretrain: step 8/10 loss 0.125",
        "pretrain: step 10/10 loss 0.1",
    ]


def test_a_run_that_ends_early_has_a_line_for_its_last_step(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("pretrain", total=10, done=0, every=4) as progress:
        progress.update(3, {"loss": 0.5}, last=True)
    assert [r.getMessage() for r in caplog.records] == ["pretrain: step 3/10 loss 0.5"]


def test_on_a_terminal_there_is_one_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO):
        run(every=4)
    shown = capsys.readouterr().err
    assert "10/10" in shown and shown.count("\n") == 1
    assert not caplog.records
