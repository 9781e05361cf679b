"""The training loop: one for pretraining, the ternary finish and sentence fine-tuning.

Source: Transformer Encoder Frankenstein, algorithm 1 (accumulate, clip, guard, step, schedule, checkpoint, log).
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from frankenstein.training.batches import batch_stream
from frankenstein.training.checkpoints import Checkpoints, RunState, seed_generators
from frankenstein.training.guard import TrainingStopped, clip_gradients, failure_notes, first_bad_parameters, unstable
from frankenstein.training.objective import Objective
from frankenstein.training.progress import Progress
from frankenstein.training.schedules import lr_factor
from frankenstein.training.settings import LoopSettings
from frankenstein.training.telemetry import COLUMNS, GRADIENT_COLUMNS, StepLog, gradient_columns, memory_columns, now

logger = logging.getLogger(__name__)
_HISTORY_ROWS = 1000
_COUNTS = ("terms", "tokens")  # values of a loss that are counts: summed over micro-batches, not averaged


@dataclass(frozen=True)
class _Record:
    """One step's values while they are still on the device."""

    step: int
    learning_rate: float
    values: dict[str, Tensor]


class Trainer:
    """Runs one objective to its last step, through crashes.

    The same arguments give the same final weights, bit for bit on one machine and thread count, also when the process
    was killed in between and `run` was called again.
    Args:
        model: on the device where it trains.
        optimizer: its groups' learning rates are the base that the schedule scales.
        resume_dir: checkpoints go to `resume_dir/fingerprint`.
        fingerprint: a digest of everything that determines the result.
        log_path: CSV step log; None keeps none.
        label: what runs, in messages.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        objective: Objective,
        settings: LoopSettings,
        *,
        resume_dir: Path,
        fingerprint: str,
        log_path: Path | None,
        label: str,
    ) -> None:
        self.model, self.optimizer, self.objective, self.settings = model, optimizer, objective, settings
        self.log_path, self.label = log_path, label
        self.checkpoints = Checkpoints(Path(resume_dir) / fingerprint, rolling=settings.max_rolling_checkpoints)
        self.state = RunState()
        self._device = next(model.parameters()).device
        self._base_lr = [group["lr"] for group in optimizer.param_groups]
        self._pending: list[_Record] = []
        self._batch: Any = None
        self._clock = 0.0
        self._history_every = math.ceil(settings.steps / _HISTORY_ROWS)

    def run(self) -> list[dict[str, Any]]:
        """Train to the last step, from the newest checkpoint if there is one.

        Returns: rows {step, loss, learning_rate, grad_norm, ...} of finished steps (counted from 1), at most about 1000
        evenly spaced ones and every validated one, which also has valid_<name>; a value that is not finite is None.
        Raises:
            TrainingStopped: when more than `max_nan_retries` steps were unstable; an emergency checkpoint is kept.
        """
        settings = self.settings
        seed_generators(settings.seed)
        resumed = self.checkpoints.restore(self.model, self.optimizer)
        if resumed is not None:
            logger.info("%s: resumed at step %d of %d", self.label, resumed.step, settings.steps)
        self.state = resumed or RunState()
        self.checkpoints.keep_best(self.state)
        columns = COLUMNS + GRADIENT_COLUMNS if settings.log_gradient_stats else COLUMNS
        done = self.state.step
        log = StepLog(self.log_path, columns, done=done, rotate=settings.csv_rotate_on_schema_change)
        batches = batch_stream(
            self.objective.batch,
            first_step=done,
            steps=settings.steps,
            per_step=settings.gradient_accumulation_steps,
            workers=settings.dataloader_workers,
        )
        progress = Progress(self.label, total=settings.steps, done=done, every=settings.telemetry_log_interval)
        with closing(batches), progress:
            self.model.train()
            self._clock = time.perf_counter()
            while self.state.step < settings.steps:
                self._step(batches, log, progress)
                self._after_step()
        return self.state.history

    def finish(self) -> None:
        """Remove the checkpoints, once the result has been written."""
        self.checkpoints.remove()

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.settings.steps

    def _must_read(self, done: int) -> bool:
        """Whether the values on the device are read after this step; reading waits for the device."""
        s = self.settings
        intervals = (s.nan_check_interval, s.eval_every_n_steps, s.checkpoint_every_n_steps)
        return done == s.steps or any(done % every == 0 for every in intervals)

    def _step(self, batches: Iterator[Any], log: StepLog, progress: Progress) -> None:
        """One optimizer step of algorithm 1; an unstable one changes no weight."""
        step = self.state.step
        learning_rate = self._set_learning_rate(step)
        self.objective.begin_step(self.model, step)
        self.optimizer.zero_grad(set_to_none=True)
        values = self._accumulate(batches)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = clip_gradients(parameters, self.settings.grad_clip_max_norm)
        bad = unstable(values["loss"], norms, self.settings.inf_post_clip_threshold)
        values |= {"grad_norm": norms.after, "grad_norm_before_clip": norms.before, "unstable": bad}
        if self.settings.log_gradient_stats and (step + 1) % self.settings.gradient_log_interval == 0:
            values |= gradient_columns(gradients)
        self._pending.append(_Record(step + 1, learning_rate, values))
        skip = False
        if self._must_read(step + 1):
            skip = self._read(log, progress)
        else:  # not read back: a bad gradient becomes zero, so that no weight turns NaN before the next check
            for gradient in gradients:
                gradient.masked_fill_(bad, 0.0)
        if not skip:
            self.optimizer.step()
        self.state.step = step + 1

    def _set_learning_rate(self, step: int) -> float:
        """Scale every group's base rate; returns the largest."""
        s = self.settings
        factor = lr_factor(step, total_steps=s.steps, warmup_ratio=s.warmup_ratio, kind=s.scheduler_type)
        for group, base in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * factor
        return max(self._base_lr) * factor

    def _accumulate(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        """Gradients of the mean loss over all micro-batches of a step, and the values of that step."""
        if self.settings.gradient_accumulation_steps == 1:
            loss, values = self._micro_batch(batches)
            loss.backward()
            return {**values, "loss": loss.detach()}
        sums: dict[str, Tensor] = {}
        total = torch.zeros((), device=self._device)
        for _ in range(self.settings.gradient_accumulation_steps):
            loss, values = self._micro_batch(batches)
            weight = values.get("terms", torch.ones((), device=self._device))
            (loss * weight).backward()
            total = total + weight
            for name, value in {**values, "loss": loss.detach()}.items():
                sums[name] = sums.get(name, 0) + (value if name in _COUNTS else value * weight)
        total = total.clamp(min=1.0)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.div_(total)
        return {name: value if name in _COUNTS else value / total for name, value in sums.items()}

    def _micro_batch(self, batches: Iterator[Any]) -> tuple[Tensor, dict[str, Tensor]]:
        self._batch = next(batches)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.amp):
            return self.objective.loss(self.model, self._batch)

    def _read(self, log: StepLog, progress: Progress) -> bool:
        """Read the pending values from the device, log them, count unstable steps; whether the last one was."""
        records, self._pending = self._pending, []
        numbers = iter(self._to_host([v for r in records for v in r.values.values()]))
        rows = [dict(zip(record.values, numbers, strict=False)) for record in records]
        seconds = time.perf_counter() - self._clock
        tokens_per_s = sum(row.get("tokens", 0.0) for row in rows) / max(seconds, 1e-9)
        for record, row in zip(records, rows, strict=True):
            self._log_row(log, record, row, tokens_per_s)
            self._remember(record, row)
            if row["unstable"]:
                self._count_unstable(record.step, row)
        shown = {"loss": rows[-1]["loss"], "lr": records[-1].learning_rate, "tokens/s": tokens_per_s}
        progress.update(records[-1].step, shown)
        self._clock = time.perf_counter()
        return bool(rows[-1]["unstable"])

    def _to_host(self, values: list[Tensor]) -> list[float]:
        numbers: list[float] = torch.stack([v.to(self._device, torch.float64) for v in values]).tolist()
        return numbers

    def _log_row(self, log: StepLog, record: _Record, row: dict[str, float], tokens_per_s: float) -> None:
        per_epoch = self.settings.steps_per_epoch
        epoch, within = divmod(record.step - 1, per_epoch) if per_epoch else (0, record.step - 1)
        terms = row.get("terms")
        extra = {
            "timestamp": now(),
            "epoch": epoch,
            "step": within + 1,
            "global_step": record.step,
            "learning_rate": record.learning_rate,
            "scaler_scale": 1.0,
            "tokens_per_s": tokens_per_s,
            "masked_tokens": None if terms is None else int(terms),
        }
        heavy = memory_columns(self._device) if record.step % self.settings.telemetry_log_interval == 0 else {}
        log.write({**row, **heavy, **extra})

    def _remember(self, record: _Record, row: dict[str, float]) -> None:
        """Put a step into the history, if it belongs there."""
        step, s = record.step, self.settings
        if step % self._history_every == 0 or step % s.eval_every_n_steps == 0 or step == s.steps:
            kept: dict[str, Any] = {"step": step, "learning_rate": record.learning_rate}
            kept |= {name: _finite(row[name]) for name in ("loss", "accuracy", "grad_norm") if name in row}
            self.state.history.append(kept)

    def _count_unstable(self, step: int, row: dict[str, float]) -> None:
        self.state.unstable += 1
        budget = self.settings.max_nan_retries
        logger.warning(
            "%s: step %d is unstable (loss %g, gradient norm %g) and was skipped; %d of %d allowed",
            self.label, step, row["loss"], row["grad_norm_before_clip"], self.state.unstable, budget,
        )  # fmt: skip
        if self.state.unstable > budget:
            self._stop(step, row)

    def _stop(self, step: int, row: dict[str, float]) -> NoReturn:
        """Keep the state for a look at it, and end the run."""
        notes = failure_notes(self.model, self.optimizer, self._batch, {"step": step, **row})
        path = self.checkpoints.save("emergency", self.model, self.optimizer, self.state, notes)
        names = ", ".join(first_bad_parameters(self.model)) or "none"
        raise TrainingStopped(
            f"{self.label}: training stopped at step {step}: loss {row['loss']:g}, "
            f"gradient norm {row['grad_norm_before_clip']:g} ({row['grad_norm']:g} after clipping); "
            f"{self.state.unstable} unstable steps, max_nan_retries allows {self.settings.max_nan_retries}. "
            f"First bad parameters: {names}. "
            f"State before the step and notes.json: {path}"
        )

    def _after_step(self) -> None:
        """Validation, best and rolling checkpoints, where they are due."""
        if self._due(self.settings.eval_every_n_steps):
            self._validate()
        if self._due(self.settings.checkpoint_every_n_steps):
            self.checkpoints.save("rolling", self.model, self.optimizer, self.state)
            self._clock = time.perf_counter()

    def _validate(self) -> None:
        self.model.eval()
        with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self.settings.amp):
            values = self.objective.validate(self.model)
        self.model.train()
        self._clock = time.perf_counter()
        if not values:
            return
        logger.info(
            "%s: step %d: %s", self.label, self.state.step, " ".join(f"valid_{k} {v:.4f}" for k, v in values.items())
        )
        self.state.history[-1].update({f"valid_{name}": _finite(value) for name, value in values.items()})
        loss = values.get("loss", math.nan)
        ranked = sorted([*self.state.best, [loss, self.state.step]])[: self.settings.num_best_checkpoints]
        if math.isfinite(loss) and [loss, self.state.step] in ranked:
            self.checkpoints.save("best", self.model, self.optimizer, self.state)
            self.state.best = ranked
            self.checkpoints.keep_best(self.state)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
