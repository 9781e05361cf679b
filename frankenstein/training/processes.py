"""The processes of one training, as torchrun starts them: who they are, and what they tell each other on the CPU.

Without torchrun's environment variables, or with WORLD_SIZE 1, there is one process and nothing here does anything.
Source: https://docs.pytorch.org/docs/stable/elastic/run.html (variables), torch.distributed.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from frankenstein.errors import FrankensteinError

T = TypeVar("T")
# Others wait this long for a process that computes; one that has ended is noticed at once.
TIMEOUT = timedelta(minutes=30)
# ... and this long for the first one while it prepares data or writes a file.
PATIENCE = timedelta(days=7)
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "nccl", "connection refused")


@dataclass(frozen=True)
class Processes:
    """The processes of a training, seen from one of them: `rank` of `size`. The first, rank 0, alone writes files."""

    rank: int = 0
    size: int = 1
    patient: Any = None  # the group in which they wait for files

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over the processes, in float64; nobody waits for a GPU."""
        if not self.several:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        summed: list[float] = total.tolist()
        return summed

    def sum_tensors(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same of 0-dim tensors on the device of this process, where they stay."""
        if not self.several or not values:
            return list(values)
        total = torch.stack([value.double() for value in values])
        dist.all_reduce(total)
        return list(total.unbind())

    def same(self, make: Callable[[], T]) -> T:
        """What `make` returns or raises (FrankensteinError) in the first process, which alone calls it, for all."""
        if not self.several:
            return make()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = make()
            except FrankensteinError as error:
                dist.broadcast_object_list([None, str(error)], group=self.patient, device=torch.device("cpu"))
                raise
        dist.broadcast_object_list(outcome, group=self.patient, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise FrankensteinError(outcome[1])
        value: T = outcome[0]
        return value

    def union(self, names: list[str]) -> list[str]:
        """All names that any process has, each once."""
        if not self.several:
            return names
        found: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(found, names, group=self.patient)
        return list(dict.fromkeys(name for part in found for name in part))


ALONE = Processes()


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the others for the time of the block: with nccl on GPUs, where LOCAL_RANK picks the device, else with gloo.

    Inside another such block, this is the same group. In all but the first process, only errors are logged.
    Raises:
        FrankensteinError: when a variable is missing or senseless, or another process has ended or does not answer.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    if _JOINED:
        yield _JOINED[-1]
        return
    rank, local, size = _numbers()
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise FrankensteinError(
            f"LOCAL_RANK is {local}, but this machine has {torch.cuda.device_count()} GPUs; "
            "expected one process a GPU (torchrun --nproc-per-node)"
        )
    with _named_losses(rank):
        if cuda:
            torch.cuda.set_device(local)
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT, device_id=torch.device("cuda", local))
        else:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        _JOINED.append(Processes(rank, size, dist.new_group(timeout=PATIENCE, backend="gloo")))
        try:
            with _quiet(rank):
                yield _JOINED[-1]
            dist.destroy_process_group()  # after an error the end of the process tells the others, without waiting
        finally:
            _JOINED.clear()


_JOINED: list[Processes] = []


def started_by_torchrun() -> bool:
    """Whether the environment says that this is one of several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def only_one_process(what: str) -> None:
    """Raise FrankensteinError if there are several."""
    if started_by_torchrun():
        raise FrankensteinError(
            f"{what} runs in one process; found WORLD_SIZE={os.environ['WORLD_SIZE']}. Start it without torchrun"
        )


def _numbers() -> tuple[int, int, int]:
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise FrankensteinError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set; expected torchrun's variables"
        )
    try:
        rank, local, size, _ = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError as error:
        raise FrankensteinError(f"RANK, LOCAL_RANK, WORLD_SIZE, MASTER_PORT: expected whole numbers; {error}") from None
    if not 0 <= rank < size or local < 0:
        raise FrankensteinError(f"RANK={rank}, LOCAL_RANK={local}, WORLD_SIZE={size}: expected 0 <= RANK < WORLD_SIZE")
    return rank, local, size


@contextmanager
def _named_losses(rank: int) -> Iterator[None]:
    """A clear error when another process is gone; torch raises a RuntimeError that speaks of sockets."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in _LOST):
            raise
        reason = str(error).strip().splitlines()[0]
        raise FrankensteinError(
            f"process {rank}: another process of this training has ended or does not answer ({reason}). "
            "Its own message tells why; run again to go on from the newest checkpoint"
        ) from error


@contextmanager
def _quiet(rank: int) -> Iterator[None]:
    log = logging.getLogger("frankenstein")
    before = log.level
    if rank > 0:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
