"""Checkpoints of a running training: a folder each, written whole or not at all, in three tiers.

Rolling ones carry a run over a crash, best ones keep the lowest validation losses, one emergency folder holds the
state of a run that stopped by itself. A folder has `model.safetensors`, `state.pt` (optimizer and generators; loads
with weights_only=True), `config.json` (position and history) and the manifest with digests.
Source: TORMENTED-BERT-Frankenstein, section 8.4.1 (table 4).
"""

import logging
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim import Optimizer

from frankenstein.artifact import ArtifactError, new_folder, open_folder, write_json

logger = logging.getLogger(__name__)
KIND = "checkpoint"


@dataclass
class RunState:
    """Where a run is: finished steps, skipped ones among them, history rows, and [loss, step] of the best."""

    step: int = 0
    unstable: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: list[list[float]] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: holds nothing else.
        rolling: rolling checkpoints kept.
    """

    def __init__(self, folder: Path, *, rolling: int) -> None:
        self.folder = folder
        self._limits = {"rolling": rolling, "emergency": 1}

    def save(self, tier: str, model: nn.Module, optimizer: Optimizer, state: RunState, notes: Any = None) -> Path:
        """Write `<tier>-<step>`; `notes` become notes.json. Then older folders of a limited tier are removed."""
        path = self.folder / f"{tier}-{state.step:08d}"
        with new_folder(path, KIND, asdict(state)) as folder:
            save_model(model, str(folder / "model.safetensors"))
            torch.save({"optimizer": optimizer.state_dict(), "generators": generator_states()}, folder / "state.pt")
            if notes is not None:
                write_json(folder / "notes.json", notes)
        if tier in self._limits:
            for old in self._tier(tier)[: -self._limits[tier]]:
                shutil.rmtree(old)
        return path

    def keep_best(self, state: RunState) -> None:
        """Remove the best checkpoints that `state.best` does not list."""
        wanted = {f"best-{int(step):08d}" for _, step in state.best}
        for path in self._tier("best"):
            if path.name not in wanted:
                shutil.rmtree(path)

    def restore(self, model: nn.Module, optimizer: Optimizer) -> RunState | None:
        """Load the newest intact rolling checkpoint, generators included; None when there is none.

        What an interrupted write left behind is removed. A damaged folder is reported and the one before it taken.
        """
        for leftover in sorted(self.folder.glob(".*")):
            shutil.rmtree(leftover)
        for path in reversed(self._tier("rolling")):
            try:
                config = open_folder(path, KIND)
            except ArtifactError as error:
                logger.warning("checkpoint skipped: %s", error)
                shutil.rmtree(path)
                continue
            load_model(model, str(path / "model.safetensors"))
            saved = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
            optimizer.load_state_dict(saved["optimizer"])
            restore_generators(saved["generators"])
            return RunState(**{name: config[name] for name in RunState.__dataclass_fields__})
        return None

    def remove(self) -> None:
        """Remove the whole folder, and its parent when that is empty then."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def _tier(self, tier: str) -> list[Path]:
        return sorted(self.folder.glob(f"{tier}-*"))


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator is part of what a run may use


def generator_states() -> dict[str, Any]:
    """States of the global generators, as tensors, numbers, strings and tuples only."""
    name, keys, position, has_gauss, cached = cast(
        tuple[str, NDArray[np.uint32], int, int, float],
        np.random.get_state(legacy=True),  # noqa: NPY002
    )
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Set the global generators to saved states."""
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
