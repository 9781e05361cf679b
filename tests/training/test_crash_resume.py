"""A run killed with SIGKILL in the middle of training, several times over, ends with the bits of an undisturbed one."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.training_standin import trainer

ROOT = Path(__file__).resolve().parents[2]
STANDIN = Path(__file__).with_name("training_standin.py")
# When the process is killed, and what is there afterwards; a "?" marks a folder that was not finished.
MOMENTS = {
    "7": ["rolling-00000005"],  # between checkpoints: steps 6 and 7 are lost
    "write": ["best-00000010?", "rolling-00000005"],  # while the first checkpoint of step 10 is being written
    "remove": ["best-00000010?", "rolling-00000005"],  # while the next process clears the half-written folder
    "12": ["best-00000010", "rolling-00000005", "rolling-00000010"],
    "remove ": ["best-00000010", "rolling-00000005", "rolling-00000010", "rolling-00000015"],  # before the oldest goes
    "16": ["best-00000010", "rolling-00000005", "rolling-00000010", "rolling-00000015"],
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_kill_9_at_any_moment_then_running_again_gives_identical_weights_history_and_log(tmp_path: Path) -> None:
    folder, log = tmp_path / "crashed", tmp_path / "crashed" / "log.csv"
    command = [sys.executable, "-W", "error", str(STANDIN), str(folder), *(m.strip() for m in MOMENTS)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90, check=True)
    for line, (moment, left) in zip(result.stdout.splitlines(), MOMENTS.items(), strict=True):
        assert json.loads(line) == [-signal.SIGKILL, left], moment
    straight, resumed = trainer(tmp_path / "straight"), trainer(folder, log=log)
    assert straight.run() == resumed.run()
    for p, q in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [line.split(",")[3] for line in log.read_text().splitlines()[1:]] == [str(s) for s in range(1, 21)]
