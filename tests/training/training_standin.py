"""A small regression with dropout that stands in for an encoder; also run as a program that is killed in the middle."""

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from frankenstein.optimizers.adamw import AdamW
from frankenstein.training import checkpoints
from frankenstein.training.loop import LoopSettings, Objective, Trainer


class Net(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.tanh(self.first(x))))


def build_net(dropout: float = 0.1) -> Net:
    torch.manual_seed(3)
    return Net(dropout)


class Regression(Objective):
    """Mean squared error; `bad_steps` get a NaN loss."""

    def __init__(self, sizes: tuple[int, ...] = (8,), bad_steps: tuple[int, ...] = (), kill_at: int = -1) -> None:
        self.sizes, self.bad_steps, self.kill_at = sizes, bad_steps, kill_at

    def batch(self, step: int, micro: int) -> dict[str, Any]:
        if step == self.kill_at:
            die()
        generator = torch.Generator().manual_seed(1000 * step + micro)
        x = torch.randn(self.sizes[micro], 4, generator=generator)
        return {"x": x, "y": x.sum(1, keepdim=True), "bad": step in self.bad_steps}

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (model(batch["x"]).float() - batch["y"]).square().mean()
        if batch["bad"]:
            loss = loss * torch.nan
        return loss, {"terms": torch.tensor(len(batch["x"])), "tokens": torch.tensor(4 * len(batch["x"]))}

    def validate(self, model: nn.Module) -> dict[str, float]:
        x = torch.linspace(-1, 1, 40).reshape(10, 4)
        return {"loss": (model(x).float() - x.sum(1, keepdim=True)).square().mean().item()}


def trainer(
    folder: Path,
    objective: Objective | None = None,
    log: Path | None = None,
    *,
    net: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    dropout: float = 0.1,
    **settings: Any,
) -> Trainer:
    values = {"steps": 20, "seed": 7, "checkpoint_every_n_steps": 5, "eval_every_n_steps": 10, **settings}
    net = net or build_net(dropout)
    return Trainer(
        net, optimizer or AdamW(net.parameters(), lr=0.01), objective or Regression(), LoopSettings(**values),
        resume_dir=folder, fingerprint="f", log_path=log, label="test",
    )  # fmt: skip


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """Writing more than this into a file fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until(folder: Path, moment: str) -> None:
    """Train to a step ("7"), half-way through writing a checkpoint ("write") or before removing a folder ("remove")."""
    if moment == "write":
        checkpoints.generator_states = die
    if moment == "remove":
        checkpoints.shutil.rmtree = die  # type: ignore[assignment]
    objective = Regression(kill_at=int(moment) if moment.isdigit() else -1)
    trainer(folder, objective, folder / "log.csv").run()


if __name__ == "__main__":
    # Arguments: a folder, then moments. Each moment is a process of its own (forked, so that torch and what its
    # optimizers need are imported once) that trains until it is killed; a line of JSON tells what it left.
    torch.set_num_threads(1)
    AdamW(build_net().parameters()).zero_grad()
    folder = Path(sys.argv[1])
    for moment in sys.argv[2:]:
        child = os.fork()
        if child == 0:
            train_until(folder, moment)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        left = sorted(p.name.split(".")[1] + "?" if p.name[0] == "." else p.name for p in (folder / "f").iterdir())
        sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(status), left]) + "\n")
        sys.stdout.flush()
