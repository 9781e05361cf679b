"""The training loop: one for pretraining, the ternary finish and sentence fine-tuning.

Source: Transformer Encoder Frankenstein, algorithm 1 (accumulate, clip, guard, step, schedule, checkpoint, log).
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from frankenstein.optimizers.modes import Averaging, averaged_weights
from frankenstein.training.accumulation import accumulate
from frankenstein.training.batches import batch_stream
from frankenstein.training.checkpoints import (
    Checkpoints,
    RunState,
    Trained,
    seed_generators,
    seed_torch,
    torch_generators,
)
from frankenstein.training.guard import clip_gradients, unstable
from frankenstein.training.objective import Objective
from frankenstein.training.parallel import Parallel, own_part, whole
from frankenstein.training.precision import Precision
from frankenstein.training.processes import only_one_process
from frankenstein.training.progress import Progress
from frankenstein.training.readings import Readings, Record, finite
from frankenstein.training.recovery import Recovery
from frankenstein.training.run import Run
from frankenstein.training.schedules import lr_factor
from frankenstein.training.settings import LoopSettings
from frankenstein.training.step_log import StepLog
from frankenstein.training.telemetry import Telemetry

logger = logging.getLogger(__name__)


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
        parallel: how several processes train the model; the objective must have `share` then.
    Raises:
        FrankensteinError: when the settings ask for telemetry that the model or the machine does not have, or there are
            several processes that know nothing of each other.
    """

    def __init__(  # noqa: PLR0913  every part by its name
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
        parallel: Parallel | None = None,
    ) -> None:
        if parallel is None:
            only_one_process(label)
            parallel = Parallel(model)
        self.model, self.optimizer, self.objective, self.settings = model, optimizer, objective, settings
        self.parallel, self.processes = parallel, parallel.processes
        self.log_path = log_path if self.processes.first else None
        device = next(model.parameters()).device
        self.precision = Precision(device, amp=settings.amp, dtype=settings.amp_dtype)
        self.checkpoints = Checkpoints(
            Path(resume_dir) / fingerprint,
            rolling=settings.max_rolling_checkpoints,
            epochs=settings.max_epoch_checkpoints,
            processes=self.processes,
        )
        trained = Trained(model, optimizer, self.precision.scaler, parallel)
        parallel.adopt(optimizer)
        self._run = Run(label, trained, objective, settings, self.precision, self.checkpoints, parallel)
        self._recovery = Recovery(self._run)
        self._telemetry = Telemetry(model, settings, self.precision, devices=self.processes.size)
        self._base_lr = [group["lr"] for group in optimizer.param_groups]
        # A method that averages its weights does what a schedule is for; a schedule on top would undo it.
        self._schedule = "constant" if isinstance(optimizer, Averaging) else settings.scheduler_type

    @property
    def label(self) -> str:
        """What runs, in messages."""
        return self._run.label

    @property
    def state(self) -> RunState:
        """Where the run is."""
        return self._run.state

    def run(self) -> list[dict[str, Any]]:
        """Train to the last step or to the end of a budget, from the newest checkpoint if there is one.

        Afterwards the model holds the result: the averaged weights, where the optimizer averages.
        Returns: rows {step, loss, learning_rate, grad_norm, ...} of finished steps (counted from 1), at most about 1000
        evenly spaced ones and every validated one, which also has valid_<name>; a value that is not finite is None.
        Raises:
            TrainingStopped: when more than `max_nan_retries` steps were unstable; an emergency checkpoint is kept.
            CheckpointError: when a checkpoint cannot be written; the earlier ones are kept.
        """
        settings = self.settings
        self._start()
        done = self.state.step
        log = StepLog(self.log_path, self._telemetry.columns, done=done, rotate=settings.csv_rotate_on_schema_change)
        batches = batch_stream(
            self._run.batch,
            first_step=done,
            steps=settings.steps,
            per_step=settings.gradient_accumulation_steps,
            workers=settings.dataloader_workers,
        )
        every, shown = settings.telemetry_log_interval, self.processes.first
        progress = Progress(self.label, total=settings.steps, done=done, every=every, shown=shown)
        with closing(batches), progress:
            self._readings = Readings(
                settings, self.state, self.precision.device, log=log, progress=progress, telemetry=self._telemetry,
                processes=self.processes,
            )  # fmt: skip
            self._began = time.perf_counter() - self.state.seconds
            self.model.train()
            while not self.state.ended_by:
                self._step(batches)
                self._after_step()
        self._end()
        return self.state.history

    def finish(self) -> None:
        """Remove the checkpoints, once the result has been written; an emergency checkpoint stays."""
        self.checkpoints.remove()

    def _start(self) -> None:
        seed_generators(self.settings.seed)
        resumed = self.checkpoints.restore(self._run.trained)
        state = self._run.state = resumed or RunState()
        state.ended_by = state.ended_by or self.settings.ended_by(state.step, state.tokens, state.seconds)
        if resumed is not None:
            logger.info("%s: resumed at step %d of %d", self.label, resumed.step, self.settings.steps)
        self.checkpoints.keep_best(state)
        if self._schedule != self.settings.scheduler_type:
            name = type(self.optimizer).__name__
            logger.info("%s: %s keeps its learning rate; scheduler_type is not applied", self.label, name)

    def _end(self) -> None:
        state, settings = self.state, self.settings
        if isinstance(self.optimizer, Averaging):
            self.optimizer.eval()
        if state.ended_by != "steps":
            limit = {"max_tokens": settings.max_tokens, "max_seconds": settings.max_seconds}[state.ended_by]
            logger.info(
                "%s: %s of %s used up: ended at step %d of %d, after %d tokens",
                self.label, state.ended_by, limit, state.step, settings.steps, state.tokens,
            )  # fmt: skip

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or bool(self.state.ended_by)

    def _epoch_due(self, done: int) -> bool:
        return self.settings.max_epoch_checkpoints != 0 and self.settings.ends_epoch(done)

    def _must_read(self, done: int) -> bool:
        """Whether the values on the device are read after this step; reading waits for the device."""
        s = self.settings
        intervals = (s.nan_check_interval, s.eval_every_n_steps, s.checkpoint_every_n_steps)
        return self._epoch_due(done) or any(done % every == 0 for every in intervals)

    def _step(self, batches: Iterator[Any]) -> None:
        """One optimizer step of algorithm 1; an unstable one changes no weight."""
        step, settings, state = self.state.step, self.settings, self.state
        if not self.processes.first:  # own draws, which a checkpoint need not hold
            seed_torch(settings.seed, step, self.processes.rank)
        generators = torch_generators()
        learning_rate = self._set_learning_rate(step)
        self.objective.begin_step(self.model, step)
        self.parallel.clear_gradients(self.optimizer)
        per_step = settings.gradient_accumulation_steps
        values = accumulate(
            self.parallel, islice(batches, per_step), self._run.loss(step), self.precision, single=per_step == 1
        )
        tokens, terms = (int(values.get(name, 0)) for name in ("tokens", "terms"))
        gradients, values = self._clip(step + 1, values)
        self._readings.add(Record(step + 1, learning_rate, values, generators))
        seconds = self._seconds()
        ended_by = settings.ended_by(step + 1, state.tokens + tokens, seconds)
        skip = False
        if ended_by or self._must_read(step + 1):
            skip = self._recovery.after_reading(self._readings.read(last=bool(ended_by)))
        else:  # not read back: a bad gradient becomes zero, so that no weight turns NaN before the next check
            for gradient in gradients:
                gradient.masked_fill_(values["skipped"], 0.0)
        if not skip:
            self._run.update(step, terms)
        state.step, state.tokens, state.seconds, state.ended_by = step + 1, state.tokens + tokens, seconds, ended_by

    def _seconds(self) -> float:
        """Spent so far; where that may end the run, by the first process's clock."""
        seconds = time.perf_counter() - self._began
        return seconds if self.settings.max_seconds is None else self.processes.same(lambda: seconds)

    def _set_learning_rate(self, step: int) -> float:
        """Scale every group's base rate; returns the largest."""
        s = self.settings
        factor = lr_factor(step, total_steps=s.steps, warmup_ratio=s.warmup_ratio, kind=self._schedule)
        for group, base in zip(self.optimizer.param_groups, self._base_lr, strict=True):
            group["lr"] = base * factor
        return max(self._base_lr) * factor

    def _clip(self, done: int, values: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Unscale and clip the gradients; returns them, and the values with norms and statistics added."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        values = values | self.precision.unscale(self.optimizer)
        norms = clip_gradients(parameters, self.settings.grad_clip_max_norm)
        bad = unstable(values["loss"], norms, self.settings.inf_post_clip_threshold)
        trouble = bad & ~(values["overflow"] & torch.isfinite(values["loss"])) if self.precision.scaled else bad
        values |= {"grad_norm": norms.after, "grad_norm_before_clip": norms.before, "skipped": bad, "unstable": trouble}
        statistics = self._telemetry.gradients(done, gradients)
        values |= {name: whole(value) for name, value in statistics.items()}
        return [own_part(gradient) for gradient in gradients], values

    def _after_step(self) -> None:
        """Validation, and the checkpoints that are due."""
        settings, state = self.settings, self.state
        validate, rolling = self._due(settings.eval_every_n_steps), self._due(settings.checkpoint_every_n_steps)
        epoch = self._epoch_due(state.step)
        if not (validate or rolling or epoch):
            return
        self._recovery.before_saving()
        if validate:
            self._validate()
        for tier, due in (("epoch", epoch), ("rolling", rolling)):
            if due:
                self.checkpoints.save(tier, self._run.trained, state)
        self._readings.restart_clock()

    def _validate(self) -> None:
        self.model.eval()
        with torch.no_grad(), self.precision.autocast(), averaged_weights(self.optimizer):
            values = self.parallel.call(self.objective.validate)
        self.model.train()
        if not values:
            return
        state = self.state
        shown = " ".join(f"valid_{name} {value:.4f}" for name, value in values.items())
        logger.info("%s: step %d: %s", self.label, state.step, shown)
        state.history[-1].update({f"valid_{name}": finite(value) for name, value in values.items()})
        loss = values.get("loss", math.nan)
        ranked = sorted([*state.best, [loss, state.step]])[: self.settings.num_best_checkpoints]
        if math.isfinite(loss) and [loss, state.step] in ranked:
            self.checkpoints.save("best", self._run.trained, state)
            state.best = ranked
            self.checkpoints.keep_best(state)
