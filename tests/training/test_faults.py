"""Pretraining in processes of its own, with faults: it ends with the right bits, or stops and says why."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.artifact import ArtifactError, new_folder, open_folder
from tests.training.tiny_language import write_language

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 30, 3
TRAINING = {
    "scheduler_total_steps": STEPS, "checkpoint_every_n_steps": EVERY, "eval_every_n_steps": 10,
    "max_epoch_checkpoints": 1,
}  # fmt: skip
LOGGED = ("epoch", "step", "global_step", "loss", "accuracy", "learning_rate", "grad_norm", "masked_tokens")


class Machine:
    """The program that runs trainings, and one undisturbed training to compare with."""

    def __init__(self, folder: Path) -> None:
        self.language, self.straight = folder / "language", folder / "straight"
        write_language(self.language)
        command = [sys.executable, "-W", "error", str(Path(__file__).with_name("fault_process.py"))]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipe = subprocess.PIPE
        self.program = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
        assert self.train(self.straight)[0] == 0

    def train(self, out: Path, training: dict[str, Any] | None = None, **fault: Any) -> tuple[int, str]:
        """Exit code and output of one training process."""
        paths = {"language": str(self.language), "out": str(out), "output": str(self.language / "output.txt")}
        job = {**paths, "training": {**TRAINING, **(training or {})}, **fault}
        assert self.program.stdin is not None and self.program.stdout is not None
        self.program.stdin.write(json.dumps(job) + "\n")
        self.program.stdin.flush()
        answer = json.loads(self.program.stdout.readline())
        return answer["code"], answer["text"]

    def finish(self, out: Path, training: dict[str, Any] | None = None) -> str:
        """Train to the end: the result must have the bits of the undisturbed training, and nothing is left over."""
        code, text = self.train(out, training)
        assert code == 0, text
        assert_same_result(out, self.straight)
        return text


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    started = Machine(tmp_path_factory.mktemp("machine"))
    yield started
    assert started.program.stdin is not None and started.program.stdout is not None
    started.program.stdin.close()
    started.program.stdout.close()
    assert started.program.wait(timeout=60) == 0


def log_rows(out: Path) -> list[tuple[str, ...]]:
    """The rows of the step log, without its times and its memory."""
    with (out / "log.csv").open(newline="") as stream:
        return [tuple(row[name] for name in LOGGED) for row in csv.DictReader(stream)]


def assert_same_result(out: Path, straight: Path) -> None:
    for path in ("metrics.json", "curve.csv", *(f"encoder/{p.name}" for p in (straight / "encoder").iterdir())):
        assert (out / path).read_bytes() == (straight / path).read_bytes(), path
    assert log_rows(out) == log_rows(straight)
    assert len(log_rows(out)) == STEPS
    assert not [p for p in (out / "resume").glob("*/*") if not p.name.startswith("emergency-")]


def saved(out: Path, tier: str = "rolling") -> list[Path]:
    """The checkpoints of a tier, oldest first."""
    return sorted((out / "resume").glob(f"*/{tier}-*"))


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def resumed_at(text: str) -> int:
    """Where a process that was started again began, by what it said."""
    lines = [line for line in text.splitlines() if " resumed at step " in line]
    return int(lines[0].split()[4]) if lines else 0


def is_intact(folder: Path) -> bool:
    try:
        open_folder(folder, "checkpoint")
    except ArtifactError:
        return False
    return True


def newest_step(out: Path) -> int:
    return max((step_of(p) for p in saved(out) if is_intact(p)), default=0)


def lost_steps(out: Path) -> int:
    """Steps in the log that no intact checkpoint has."""
    done = [int(row[LOGGED.index("global_step")]) for row in log_rows(out)] if (out / "log.csv").exists() else []
    return max(done, default=0) - newest_step(out)


def kill_and_finish(machine: Machine, out: Path, kills: int, seed: int) -> None:
    """Moments drawn over the whole run: so many steps, then some milliseconds. The first is in the start-up."""
    draw = random.Random(seed)
    moments = sorted(draw.choices(range(STEPS - 3), k=kills - 1))
    newest = 0
    for rows in (0, *moments):
        seconds = draw.uniform(0, 0.1 if rows == 0 else 0.03)
        kill = {"rows": rows, "seconds": seconds}
        code, text = machine.train(out, kill=kill, pause_at={"last": STEPS - 1})
        assert code == -signal.SIGKILL, (code, text)
        assert " resumed at step " not in text or resumed_at(text) == newest
        assert lost_steps(out) <= EVERY, kill
        newest = newest_step(out)
    assert resumed_at(machine.finish(out)) == newest


def test_a_training_killed_at_ten_random_moments_ends_with_the_bits_of_an_undisturbed_one(
    machine: Machine, tmp_path: Path
) -> None:
    kill_and_finish(machine, tmp_path / "out", kills=10, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_other_random_moments_give_the_same_bits(machine: Machine, tmp_path: Path, seed: int) -> None:
    kill_and_finish(machine, tmp_path / "out", kills=10, seed=seed)


IN_CHECKPOINTS = [
    ("text", "half", 1, "log.csv"),  # before the first step
    ("weights", "before", 1, "rolling-"),
    ("weights", "half", 1, "rolling-"),
    ("remove", "half", 1, "/."),  # while the next process clears what that one left
    ("weights", "after", 1, ""),
    ("state", "before", 2, ""),
    ("state", "half", 1, ""),
    ("state", "after", 2, ""),
    ("text", "half", 1, "config.json"),
    ("replace", "before", 2, "config.json"),
    ("text", "half", 1, "manifest.json"),
    ("replace", "after", 2, "manifest.json"),
    ("rename", "before", 1, "best-"),
    ("rename", "after", 1, "best-"),
    ("rename", "before", 1, "rolling-"),
    ("rename", "after", 1, "rolling-"),
    ("remove", "before", 1, "rolling-"),
    ("remove", "half", 1, "rolling-"),
    ("remove", "after", 1, "epoch-"),
]
AT_THE_END = [
    ("encoder", "half", 1, ""),
    ("rename", "before", 1, "encoder"),
    ("rename", "after", 1, "encoder"),
    ("text", "half", 1, "metrics.json"),
    ("replace", "before", 1, "curve.csv"),
    ("remove", "half", 1, "best-"),
]


def die_in(target: str, when: str, call: int, name: str) -> dict[str, Any]:
    return {"target": target, "when": when, "call": call, "name": name}


def test_a_training_killed_inside_every_write_of_a_checkpoint_ends_with_the_same_bits(
    machine: Machine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for moment in IN_CHECKPOINTS:
        code, text = machine.train(out, die_in=die_in(*moment))
        assert code == -signal.SIGKILL, (moment, text)
        assert lost_steps(out) <= EVERY, moment
    machine.finish(out)


def test_a_training_killed_while_it_writes_its_result_ends_with_the_same_bits(machine: Machine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for moment in AT_THE_END:
        code, text = machine.train(out, die_in=die_in(*moment))
        assert code == -signal.SIGKILL, (moment, text)
        assert step_of(saved(out)[-1]) == STEPS
    assert resumed_at(machine.finish(out)) == STEPS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if mounted is None or mounted.returncode != 0:
        pytest.skip(f"may not mount a tmpfs: {'no mount command' if mounted is None else mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, free: int) -> Path:
    """A file that leaves so many bytes free."""
    ballast, room = disk / "ballast", os.statvfs(disk)
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - free))
    return ballast


def test_every_write_that_finds_the_disk_full_is_one_message_and_with_room_the_bits_are_the_same(
    machine: Machine, small_disk: Path
) -> None:
    out, told = small_disk / "out", set()
    machine.train(out, die_in=die_in("rename", "after", 2, "rolling-"))
    for kilobytes in (0, 4, 8, 28, 36, 60, 100):  # the log, then a checkpoint's weights, state, config and manifest
        intact = len(saved(out))
        ballast = fill(small_disk, 1024 * kilobytes)
        code, text = machine.train(out)
        ballast.unlink()
        [message] = [line for line in text.splitlines() if line.endswith("No space left on device") or "Make" in line]
        assert code == 2 and text.endswith(message + "\n") and "Traceback" not in text
        told.add(message.partition(" ")[0])
        assert len(saved(out)) >= intact and not list((out / "resume").glob("*/.*"))
        for folder in (out / "resume").glob("*/*-*"):
            open_folder(folder, "checkpoint")
        if message.startswith("checkpoint"):
            assert message.endswith(f"training goes on from {saved(out)[-1].name}")
    assert told == {f"{out / 'log.csv'}:", "checkpoint"}
    assert resumed_at(machine.finish(out)) > 6


def test_a_disk_without_room_for_the_result_is_one_message_and_no_step_is_done_again(
    machine: Machine, small_disk: Path, tmp_path: Path
) -> None:
    out, elsewhere = small_disk / "out", tmp_path / "elsewhere"
    for folder in (out, elsewhere):
        folder.mkdir()
    (out / "resume").symlink_to(elsewhere)
    log = {"csv_log_path": str(tmp_path / "log.csv")}
    code, kilobytes, told = -1, 0, []
    while code != 0:
        ballast = fill(small_disk, 1024 * kilobytes)
        code, text = machine.train(out, log)
        ballast.unlink()
        if code != 0:
            path, reason = text.splitlines()[-1].split(" could not be written: ")
            assert (code, reason) == (2, "No space left on device. Make room and run again") and "Traceback" not in text
            assert step_of(saved(out)[-1]) == STEPS and not list(out.glob(".*"))
            told.append(Path(path).name)
        assert kilobytes == 0 or resumed_at(text) == STEPS
        kilobytes += 4
    assert list(dict.fromkeys(told)) == ["encoder", "metrics.json"]
    shutil.copy(tmp_path / "log.csv", out)
    assert_same_result(out, machine.straight)
    assert (out / "resume").is_symlink() and not list(elsewhere.iterdir())


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path, at: int = -1, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut short": (lambda folder: cut(folder / "model.safetensors"), "bytes, the manifest says"),
    "a bit of the optimizer's state": (lambda folder: flip(folder / "state.pt", 999, 5), "its sha256 differs"),
    "a bit of the position": (lambda folder: flip(folder / "config.json", 99), "its sha256 differs"),
    "a bit of a key in the manifest": (
        lambda folder: flip(folder / "manifest.json", (folder / "manifest.json").read_bytes().index(b"sha256")),
        "damaged; expected kind, format and files",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "an empty manifest": (lambda folder: os.truncate(folder / "manifest.json", 0), "not readable JSON"),
    "no state": (lambda folder: (folder / "state.pt").unlink(), "missing, though the manifest lists it"),
    "an empty folder": (emptied, "has no manifest.json"),
    "a file instead": (replace_by_a_file, "no such folder"),
}


THREE = {"max_rolling_checkpoints": 3}


@pytest.fixture(scope="module")
def backup(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training that was killed at step 20, with three rolling checkpoints, and a copy of its folder."""
    folder = tmp_path_factory.mktemp("killed")
    out = folder / "out"
    machine.train(out, THREE, die_in=die_in("text", "half", 1, "best-00000020"))
    assert [step_of(p) for p in saved(out)] == [12, 15, 18]
    return out, Path(shutil.copytree(out, folder / "copy"))


@pytest.fixture
def killed(backup: tuple[Path, Path]) -> Path:
    """That folder as the kill left it, at the place that its checkpoints belong to."""
    out, copy = backup
    shutil.rmtree(out)
    return Path(shutil.copytree(copy, out))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_gives_the_same_bits(
    machine: Machine, killed: Path, name: str
) -> None:
    spoil, said = DAMAGE[name]
    newest = saved(killed)[-1]
    spoil(newest)
    text = machine.finish(killed, THREE)
    [skipped] = [line for line in text.splitlines() if line.startswith("checkpoint skipped: ")]
    assert said in skipped and str(newest) in skipped
    assert resumed_at(text) == 15


@pytest.mark.parametrize(("damaged", "goes_on"), [(2, 12), (3, 0)])
def test_with_more_damaged_checkpoints_training_goes_further_back(
    machine: Machine, killed: Path, damaged: int, goes_on: int
) -> None:
    for folder in saved(killed)[-damaged:]:
        cut(folder / "state.pt")
    text = machine.finish(killed, THREE)
    assert text.count("checkpoint skipped: ") == damaged and resumed_at(text) == goes_on


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with new_folder(folder, "checkpoint", {"step": 1}):
        pass
    manifest = folder / "manifest.json"
    good = manifest.read_bytes()
    for at in range(8 * len(good) - 8):  # all but the newline at the end
        flip(manifest, at // 8, at % 8)
        with pytest.raises(ArtifactError):
            open_folder(folder, "checkpoint")
        manifest.write_bytes(good)


def emergency(out: Path) -> Path:
    [folder] = saved(out, "emergency")
    assert open_folder(folder, "checkpoint")["label"] == "pretrain"
    files = "batch.safetensors config.json manifest.json model.safetensors notes.json state.pt"
    assert sorted(p.name for p in folder.iterdir()) == files.split()
    return folder


def assert_replays(machine: Machine, folder: Path) -> list[str]:
    code, text = machine.train(folder.parent, replay=str(folder))
    lines = text.splitlines()
    assert code == 0 and lines[0].startswith("pretrain: step ") and lines[-1].startswith("training rows: "), text
    return lines


@pytest.mark.parametrize(("what", "interval"), [("loss", 1), ("gradient", 2), ("weights", 1), ("optimizer", 2)])
def test_a_nan_once_costs_a_retry_and_training_ends_with_finite_weights(
    machine: Machine, tmp_path: Path, what: str, interval: int
) -> None:
    out, settings = tmp_path / "out", {"nan_check_interval": interval}
    poison = {"what": what, "first": 16, "forever": False}
    code, text = machine.train(out, settings, poison=poison)
    assert code == 0, text
    assert text.count("1 of 3 retries used") == 1 and "2 of 3" not in text
    assert ("weights and optimizer state are those of step 15 again" in text) == (what in ("weights", "optimizer"))
    assert all(torch.isfinite(t).all() for t in load_file(out / "encoder" / "model.safetensors").values())
    assert len(log_rows(out)) == STEPS
    assert_replays(machine, emergency(out))

    again = tmp_path / "again"
    machine.train(again, settings, poison=poison, die_in=die_in("weights", "half", 1, "rolling-00000021"))
    assert machine.train(again, settings, poison=poison)[0] == 0
    assert_same_result(again, out)


@pytest.mark.parametrize("what", ["loss", "gradient", "weights", "optimizer"])
def test_a_nan_in_every_step_stops_the_training_with_what_it_takes_to_run_the_step_again(
    machine: Machine, tmp_path: Path, what: str
) -> None:
    out = tmp_path / "out"
    code, text = machine.train(out, poison={"what": what, "first": 16, "forever": True})
    folder = emergency(out)
    message = text.splitlines()[-1]
    assert code == 2 and "Traceback" not in text and not (out / "encoder").exists()
    assert message.startswith("pretrain: training stopped at step ") and "max_nan_retries allows 3" in message
    assert message.endswith(f"run it again: frankenstein-transformer replay {folder}")
    for kept in (out / "resume").glob("*/[!e]*-*"):
        assert all(torch.isfinite(t).all() for t in load_file(kept / "model.safetensors").values()), kept
    assert step_of(folder) >= 19 and step_of(saved(out)[-1]) >= 15
    notes = json.loads((folder / "notes.json").read_text())
    replayed = assert_replays(machine, folder)
    if what in ("weights", "optimizer"):  # in the folder: the weights as they were when the step went wrong
        assert "blocks.1.ffn.up.weight" in notes["not_finite"]
        assert not torch.isfinite(load_file(folder / "model.safetensors")["blocks.1.ffn.up.weight"]).all()
        assert replayed[2:4] == [
            "now: loss nan, gradient norm nan",
            "first not finite: blocks.1.ffn.up (Linear), output of call 1: 5 of 120 values not finite, input finite, "
            "own weights not finite",
        ]
    else:  # the fault is not in the folder, so that its replay is sound
        assert notes["not_finite"] == [] and replayed[3] == "first not finite: nothing that is not finite"
        assert notes["second_run"]["first_bad"]["what"] == {"loss": "loss", "gradient": "gradient of the weights"}[what]
