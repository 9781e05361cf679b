"""A program that runs jobs, each in several processes with the variables that torchrun sets.

It reads a line of JSON per job and answers with one: exit code and output of every process. The processes are forked,
so that torch is imported once; everything else is that of the command line.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from frankenstein import cli
from frankenstein.errors import FrankensteinError
from frankenstein.runtime import prepare_torch
from frankenstein.training import sharded
from frankenstein.training.loop import Trainer
from frankenstein.training.mlm import MlmObjective
from frankenstein.training.options import OptimizerOptions
from tests.training.tiny_language import pretrain_tiny

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
WROTE = 99  # exit code of a process that changed a file though it is not the first


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def write_nothing_below(folder: str) -> None:
    """End this process as soon as it changes a file there."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and str(arguments[0]).startswith(folder):
            os.write(2, f"{event} {arguments[0]}\n".encode())
            os._exit(WROTE)

    sys.addaudithook(watch)


def die_at(last: int) -> None:
    """Kill this process when it makes the batch of a step."""
    batch = MlmObjective.batch

    def dying(self: MlmObjective, step: int, micro: int) -> Any:
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step, micro)

    MlmObjective.batch = dying  # type: ignore[method-assign]


def poison_at(bad: int) -> None:
    """A loss that is not a number, in this process, at a step."""
    begin_step, loss = MlmObjective.begin_step, MlmObjective.loss
    now = [0]

    def begin(self: MlmObjective, model: Any, step: int) -> None:
        now[0] = step
        begin_step(self, model, step)

    def spoilt(self: MlmObjective, model: Any, batch: Any) -> Any:
        value, values = loss(self, model, batch)
        return (value * torch.nan if now[0] == bad else value), values

    MlmObjective.begin_step, MlmObjective.loss = begin, spoilt  # type: ignore[method-assign]


def keep_results(path: str) -> None:
    """Write what this process holds in the end: weights, history and generator."""
    finish = Trainer.finish

    def keep(self: Trainer) -> None:
        weights = self.parallel.weights() or {name: t.cpu().clone() for name, t in self.model.state_dict().items()}
        parts = {"weights": weights, "history": self.state.history, "generator": torch.get_rng_state()}
        torch.save(parts, path)
        finish(self)

    Trainer.finish = keep  # type: ignore[method-assign]


def work(job: dict[str, Any], rank: int, port: int) -> int:
    """One process of a job: a small pretraining, or the command line; returns the exit code."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["size"], "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    if rank > 0:
        write_nothing_below(job["out"])
    keep_results(f"{job['results']}/{rank}.pt")
    for name, act in {"die_at": die_at, "poison_at": poison_at}.items():
        if name in job and rank == job["size"] - 1:
            act(job[name])
    if "command" in job:
        return cli.main(job["command"])
    try:
        optimizer = {"optimizer": OptimizerOptions(job["optimizer"])} if "optimizer" in job else {}
        pretrain_tiny(Path(job["language"]), Path(job["out"]), model=job["model"], **job["training"], **optimizer)
    except FrankensteinError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def start(job: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child == 0:
        file = os.open(f"{job['results']}/{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        code = work(job, rank, port)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return child


def serve() -> None:
    assert sharded.Sharded  # imported once for all
    prepare_torch(1)
    for line in sys.stdin:
        job = json.loads(line)
        port = free_port()
        children = [start(job, rank, port) for rank in range(job["size"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        texts = [Path(f"{job['results']}/{rank}.txt").read_text() for rank in range(job["size"])]
        sys.stdout.write(json.dumps(list(zip(codes, texts, strict=True))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
