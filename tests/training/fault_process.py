"""A program that pretrains a tiny encoder as often as it is told, each time in a process of its own with a fault in it.

It reads a line of JSON per job and answers with one: the exit code and all that the process wrote. The processes are
forked, so that torch is imported once; everything else is that of a stage: its errors, its messages, its exit code.
"""

import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from frankenstein import cli
from frankenstein.model import storage
from frankenstein.params import load_params
from frankenstein.runtime import prepare_torch
from frankenstein.training import checkpoints, pretrain
from frankenstein.training.mlm import MlmObjective
from stages.runner import run
from tests.training.tiny_language import pretrain_tiny
from tests.training.training_standin import die

ROOT = Path(__file__).resolve().parents[2]


def half_of_a_file(save: Callable[..., Any], tensors: Any, path: Any, *rest: Any, **options: Any) -> None:
    save(tensors, path, *rest, **options)
    os.truncate(path, Path(path).stat().st_size // 2)


def half_of_a_stream(save: Callable[..., Any], parts: Any, stream: Any) -> None:
    buffer = io.BytesIO()
    save(parts, buffer)
    stream.write(buffer.getvalue()[: buffer.tell() // 2])
    stream.flush()


def half_of_a_text(_: Callable[..., Any], handle: int) -> None:
    os.ftruncate(handle, os.fstat(handle).st_size // 2)


def half_of_a_folder(_: Callable[..., Any], folder: Any, **__: Any) -> None:
    for file in sorted(Path(folder).iterdir())[::2]:
        file.unlink()


# What is interrupted: where the call stands, which argument says what it writes, and how it is left half done.
TARGETS: dict[str, tuple[Any, str, Callable[..., Any], Callable[..., None] | None]] = {
    "weights": (checkpoints, "save_model", lambda _, path: path, half_of_a_file),
    "state": (torch, "save", lambda _, stream: stream.name, half_of_a_stream),
    "text": (os, "fsync", lambda handle: Path(f"/proc/self/fd/{handle}").readlink(), half_of_a_text),
    "replace": (Path, "replace", lambda _, target: target, None),
    "rename": (Path, "rename", lambda _, target: target, None),
    "remove": (shutil, "rmtree", lambda folder, **_: folder, half_of_a_folder),
    "encoder": (storage, "save_file", lambda _, path, **__: path, half_of_a_file),
}


def die_in(target: str, when: str, call: int = 1, name: str = "") -> None:
    """Kill this process before, half-way through or after the given call that writes a path with the name in it."""
    owner, attribute, path, half = TARGETS[target]
    real, calls = vars(owner)[attribute], itertools.count(1)

    def spoilt(*arguments: Any, **options: Any) -> Any:
        if name not in str(path(*arguments, **options)) or next(calls) != call:
            return real(*arguments, **options)
        if when == "half" and half is not None:
            half(real, *arguments, **options)
        if when == "after":
            real(*arguments, **options)
        return die()

    setattr(owner, attribute, spoilt)


def poison(what: str, first: int, *, forever: bool) -> None:
    """NaN in the loss, in one number of a gradient, of a weight or of the optimizer's state, from a step on."""
    begin_step, loss, build = MlmObjective.begin_step, MlmObjective.loss, pretrain.build_optimizer
    optimizers: list[Any] = []
    hooks: list[Any] = []
    now = [0]

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            tensor.view(-1)[3] = torch.nan
        return tensor

    def bad() -> bool:
        return now[0] == first or (forever and now[0] > first)

    def spoilt_begin(self: MlmObjective, model: Any, step: int) -> None:
        begin_step(self, model, step)
        now[0], weight = step, model.blocks[1].ffn.up.weight
        while hooks:
            hooks.pop().remove()
        if bad() and what == "gradient":
            hooks.append(weight.register_hook(lambda gradient: spoil(gradient.clone())))
        if bad() and what == "weights":
            spoil(weight)
        if bad() and what == "optimizer":
            spoil(optimizers[0].state[weight]["exp_avg"])

    def spoilt_loss(self: MlmObjective, model: Any, batch: Any) -> Any:
        value, values = loss(self, model, batch)
        return (value * torch.nan if what == "loss" and bad() else value), values

    def spoilt_build(*arguments: Any) -> Any:
        optimizers.append(build(*arguments))
        return optimizers[0]

    MlmObjective.begin_step, MlmObjective.loss = spoilt_begin, spoilt_loss  # type: ignore[method-assign]
    pretrain.build_optimizer = spoilt_build


def pause_at(last: int) -> None:
    """Wait at this step for the signal that ends the process, so that it cannot come too late."""
    batch = MlmObjective.batch

    def waiting(self: MlmObjective, step: int, micro: int) -> Any:
        while step >= last:
            signal.pause()
        return batch(self, step, micro)

    MlmObjective.batch = waiting  # type: ignore[method-assign]


def work(job: dict[str, Any]) -> None:
    """What the forked process does: it ends with the exit code of a stage or of the command line."""
    file = os.open(job["output"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name, act in {"die_in": die_in, "poison": poison, "pause_at": pause_at}.items():
        if name in job:
            act(**job[name])
    try:
        if "replay" in job:
            sys.exit(cli.main(["replay", job["replay"]]))
        sys.argv = ["pretrain.py", "--language", job["language"], "--out", job["out"]]
        model = {"dropout": 0.1}  # draws from the generators whose states a checkpoint holds
        run(lambda params, *, language, out: pretrain_tiny(language, out, model=model, **job["training"]))
    except SystemExit as end:
        leave(end.code)
    leave(0)


def leave(code: Any) -> None:
    """End without the half second that an orderly shutdown of torch takes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def kill(child: int, log: Path, was: int, rows: int, seconds: float) -> None:
    """Kill a process so many seconds after its log, which was another file, has so many steps; 0: after its start."""
    while rows and not (log.exists() and log.stat().st_ino != was and log.read_bytes().count(b"\n") > rows):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return  # something else ended it: the exit code says so
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)


def serve() -> None:
    prepare_torch(1)  # imports what every process would import for itself
    load_params(ROOT / "params.yaml")
    for line in sys.stdin:
        job = json.loads(line)
        out = Path(job["out"])
        out.mkdir(exist_ok=True)
        log = out / "log.csv"
        was = log.stat().st_ino if log.exists() else 0
        child = os.fork()
        if child == 0:
            work(job)
        if "kill" in job:
            kill(child, log, was, **job["kill"])
        _, status = os.waitpid(child, 0)
        answer = {"code": os.waitstatus_to_exitcode(status), "text": Path(job["output"]).read_text()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
