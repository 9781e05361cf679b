"""Values of finished steps: kept on the device until they are read together, then logged, shown and remembered."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frankenstein.training.checkpoints import RunState
from frankenstein.training.processes import ALONE, Processes
from frankenstein.training.progress import Progress
from frankenstein.training.settings import LoopSettings
from frankenstein.training.step_log import StepLog, now
from frankenstein.training.telemetry import Telemetry

HISTORY_ROWS = 1000
_REMEMBERED = ("loss", "accuracy", "grad_norm")


@dataclass(frozen=True)
class Record:
    """One step whose values are still on the device; `generators` are torch's states before its forward pass."""

    step: int
    learning_rate: float
    values: dict[str, Tensor]
    generators: dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """A record and its values as numbers."""

    record: Record
    values: dict[str, float]


class Readings:
    """Collects records; `read` waits for the device once for all of them.

    Args:
        state: its history gets the rows.
        device: where the values are.
        processes: all of them decide by what the first one reads.
    """

    def __init__(
        self,
        settings: LoopSettings,
        state: RunState,
        device: torch.device,
        *,
        log: StepLog,
        progress: Progress,
        telemetry: Telemetry,
        processes: Processes = ALONE,
    ) -> None:
        self.settings, self.state, self.device = settings, state, device
        self.log, self.progress, self.telemetry, self.processes = log, progress, telemetry, processes
        self._pending: list[Record] = []
        self._history_every = math.ceil(settings.steps / HISTORY_ROWS)
        self.restart_clock()

    def add(self, record: Record) -> None:
        """Keep a step's values."""
        self._pending.append(record)

    def restart_clock(self) -> None:
        """Leave the time until now out of the throughput."""
        self._clock = time.perf_counter()

    def read(self, *, last: bool) -> list[Reading]:
        """All steps since the last reading.

        Args:
            last: the run ends with the newest of them.
        """
        records, self._pending = self._pending, []
        numbers = iter(self._to_host([v for r in records for v in r.values.values()]))
        readings = [Reading(r, dict(zip(r.values, numbers, strict=False))) for r in records]
        seconds = max(time.perf_counter() - self._clock, 1e-9)
        rates = [sum(r.values.get(name, 0.0) for r in readings) / seconds for name in ("tokens", "terms")]
        for reading in readings:
            self._log_row(reading, rates)
            self._remember(reading, last=last and reading is readings[-1])
        newest = readings[-1]
        shown = {"loss": newest.values["loss"], "lr": newest.record.learning_rate, "tokens/s": rates[0]}
        self.progress.update(newest.record.step, shown, last=last)
        self.restart_clock()
        return readings

    def _to_host(self, values: list[Tensor]) -> list[float]:
        numbers: list[float] = torch.stack([v.to(self.device, torch.float64) for v in values]).tolist()
        return self.processes.same(lambda: numbers)

    def _log_row(self, reading: Reading, rates: Sequence[float]) -> None:
        if self.log.path is None:
            return
        record, per_epoch = reading.record, self.settings.steps_per_epoch
        epoch, within = divmod(record.step - 1, per_epoch) if per_epoch else (0, record.step - 1)
        terms = reading.values.get("terms")
        extra = {
            "timestamp": now(),
            "epoch": epoch,
            "step": within + 1,
            "global_step": record.step,
            "learning_rate": record.learning_rate,
            "tokens_per_s": rates[0],
            "masked_tokens": None if terms is None else int(terms),
        }
        heavy = self.telemetry.heavy(record.step, rates[0], rates[1])
        self.log.write({"scaler_scale": 1.0, **reading.values, **heavy, **extra})

    def _remember(self, reading: Reading, *, last: bool) -> None:
        """Put a step into the history, if it belongs there."""
        step = reading.record.step
        if last or step % self._history_every == 0 or step % self.settings.eval_every_n_steps == 0:
            kept: dict[str, Any] = {"step": step, "learning_rate": reading.record.learning_rate}
            kept |= {name: finite(reading.values[name]) for name in _REMEMBERED if name in reading.values}
            self.state.history.append(kept)


def finite(value: float) -> float | None:
    """The value, or None where it is NaN or Inf."""
    return value if math.isfinite(value) else None
