"""Checkpoints of a running training: a folder each, written whole or not at all, in four tiers.

Rolling ones carry a run over a crash, best ones keep the lowest validation losses, epoch ones the end of every epoch,
and one emergency folder holds what went wrong last (see emergency.py). A folder has `model.safetensors`, `state.pt`
(optimizer, loss scaler and generators; loads with weights_only=True), `config.json` (position and history) and the
manifest with digests. Where a method is evaluated at other weights than it trains at, a checkpoint holds the former.
Source: TORMENTED-BERT-Frankenstein, section 8.4.1 (table 4).
"""

import logging
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.optim import Optimizer

from frankenstein.artifact import ArtifactError, new_folder, open_folder
from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.modes import averaged_weights, training_weights
from frankenstein.training.guard import not_finite
from frankenstein.training.parallel import Parallel
from frankenstein.training.processes import ALONE, Processes

logger = logging.getLogger(__name__)
KIND = "checkpoint"
WEIGHTS, STATE = "model.safetensors", "state.pt"


class CheckpointError(FrankensteinError):
    """A checkpoint could not be written."""


@dataclass
class RunState:
    """Where a run is.

    `step` counts finished steps, `unstable` the retries that were used, `tokens` and `seconds` what was spent;
    `ended_by` names the limit that ended the run (empty: it goes on); `hessian_terms` counts the terms of the last
    Hessian estimate. `history` are rows, `best` is [loss, step] of the best. Equality leaves the seconds out.
    """

    step: int = 0
    unstable: int = 0
    tokens: int = 0
    ended_by: str = ""
    hessian_terms: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: list[list[float]] = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Trained:
    """The parts of a run whose state a checkpoint holds."""

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    parallel: Parallel | None = None  # None: all of it in this process

    @property
    def held(self) -> Parallel:
        """How the processes hold model and optimizer."""
        return self.parallel or Parallel(self.model)

    def not_finite(self) -> list[str]:
        """Names of the weights that hold NaN or Inf here, or whose optimizer state does."""
        return not_finite(self.held.optimized(), self.optimizer)

    def load(self, folder: Path) -> dict[str, Any]:
        """Take the state of a checkpoint folder; returns the generators' states."""
        saved = torch.load(folder / STATE, weights_only=True, map_location="cpu")
        self.held.load(folder / WEIGHTS, self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        training_weights(self.optimizer)
        generators: dict[str, Any] = saved["generators"]
        return generators


@dataclass(frozen=True)
class Dump:
    """What an emergency checkpoint has besides the state: generators of an earlier moment, config entries, files."""

    generators: dict[str, Any]
    config: dict[str, Any]
    write: Callable[[Path], None]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds nothing else.
        rolling: rolling checkpoints kept.
        epochs: epoch checkpoints kept; None keeps all.
        processes: all call the methods together; the first one writes and removes, all load the same folder. What is
            written does not tell how many there were.
    """

    def __init__(self, folder: Path, *, rolling: int, epochs: int | None = None, processes: Processes = ALONE) -> None:
        self.folder, self.processes = folder, processes
        self._limits = {"rolling": rolling, "emergency": 1, **({} if epochs is None else {"epoch": epochs})}

    def save(self, tier: str, trained: Trained, state: RunState, dump: Dump | None = None) -> Path:
        """Write `<tier>-<step>`, then remove older folders of a limited tier.

        An emergency checkpoint (one with a dump) keeps the training weights, which are those that went wrong.
        Raises:
            CheckpointError: when it cannot be written (a full disk); older checkpoints are as they were.
        """
        path = self.folder / f"{tier}-{state.step:08d}"
        config = {**asdict(state), **({} if dump is None else dump.config)}
        with nullcontext() if dump is not None else averaged_weights(trained.optimizer):
            weights, optimizer = trained.held.weights(), trained.held.optimizer_state(trained.optimizer)
            if self.processes.first:
                self._write(path, config, trained, dump, weights, optimizer)
        return path

    def _write(
        self,
        path: Path,
        config: dict[str, Any],
        trained: Trained,
        dump: Dump | None,
        weights: dict[str, Tensor] | None,
        optimizer: dict[str, Any],
    ) -> None:
        tier = path.name.partition("-")[0]
        with self._disk_errors(path), new_folder(path, KIND, config) as folder:
            if weights is None:
                save_model(trained.model, str(folder / WEIGHTS))
            else:
                save_file(weights, folder / WEIGHTS)
            parts = {
                "optimizer": optimizer,
                "scaler": trained.scaler.state_dict(),
                "generators": generator_states() if dump is None else dump.generators,
            }
            with (folder / STATE).open("wb") as stream:  # given a path, torch hides the reason of a failure
                torch.save(parts, stream)
            if dump is not None:
                dump.write(folder)
        if tier in self._limits:
            self._prune(tier, self._limits[tier])

    def keep_best(self, state: RunState) -> None:
        """Remove the best checkpoints that `state.best` does not list."""
        if not self.processes.first:
            return
        wanted = {f"best-{int(step):08d}" for _, step in state.best}
        for path in self._tier("best"):
            if path.name not in wanted:
                _discard(path)

    def restore(self, trained: Trained, *, generators: bool = True) -> RunState | None:
        """Load the newest intact rolling checkpoint; None when there is none.

        What an interrupted write left behind is removed. A damaged folder, or one with NaN or Inf in it, is reported
        and the one before it taken.
        Args:
            generators: set the global generators, too.
        """
        if self.processes.first:
            for leftover in sorted(self.folder.glob(".*")):
                _discard(leftover)
        for path in self.processes.same(lambda: self._tier("rolling")[::-1]):
            config = self.processes.same(partial(self._open, path))
            if config is None:
                continue
            states = trained.load(path)
            if bad := self.processes.union(trained.not_finite()):
                self._skip(path, f"{path}: not finite: {', '.join(bad)}")
                continue
            if generators:
                restore_generators(states)
            return RunState(**{name: config[name] for name in RunState.__dataclass_fields__})
        return None

    def _open(self, path: Path) -> dict[str, Any] | None:
        try:
            return open_folder(path, KIND)
        except ArtifactError as error:
            self._skip(path, str(error))
            return None

    def _skip(self, path: Path, reason: str) -> None:
        logger.warning("checkpoint skipped: %s", reason)
        if self.processes.first:
            _discard(path)

    def remove(self) -> None:
        """Remove all but the emergency checkpoint, and the folder and its parent when they are empty then.

        A link to a folder elsewhere stays.
        """
        if not self.processes.first:
            return
        for path in sorted(self.folder.glob("*")):
            if not path.name.startswith("emergency-"):
                _discard(path)
        for folder in (self.folder, self.folder.parent):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()

    def _tier(self, tier: str) -> list[Path]:
        return sorted(self.folder.glob(f"{tier}-*"))

    def _prune(self, tier: str, limit: int) -> None:
        paths = self._tier(tier)
        for old in paths[: max(0, len(paths) - limit)]:
            _discard(old)

    @contextmanager
    def _disk_errors(self, path: Path) -> Iterator[None]:
        """One message for what the three writers raise when the disk is full or refuses."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if (reason := _disk_reason(error)) is None:
                raise
            earlier = self._tier("rolling")
            start = f"training goes on from {earlier[-1].name}" if earlier else "training starts from the beginning"
            raise CheckpointError(
                f"checkpoint {path} could not be written: {reason}. The earlier ones are intact. "
                f"Make room and run again: {start}"
            ) from error


def _discard(path: Path) -> None:
    """Remove a folder, or the file that stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _disk_reason(error: BaseException | None) -> str | None:
    """What the system said, also where torch raised an error of its own while it closed the file; None if nothing."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        if isinstance(error, SafetensorError):
            return re.sub(r" \(os error \d+\)$", "", str(error).rpartition(": ")[2])
        error = error.__context__
    return None


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator is part of what a run may use


def seed_torch(*seed: int) -> None:
    """Seed torch's global generators from several numbers."""
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))


def torch_generators() -> dict[str, Any]:
    """States of torch's global generators, from which dropout draws; nobody waits for the device."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def generator_states() -> dict[str, Any]:
    """States of all global generators, as tensors, numbers, strings and tuples only."""
    name, keys, position, has_gauss, cached = cast(
        tuple[str, NDArray[np.uint32], int, int, float],
        np.random.get_state(legacy=True),  # noqa: NPY002
    )
    return {
        **torch_generators(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Set the global generators to saved states; those of GPUs only where there are GPUs."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
