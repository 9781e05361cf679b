"""What follows an unstable step: it is skipped, or the run goes back to a checkpoint's weights, or it stops.

    unstable (r retries so far): r = max_nan_retries: stop;  else r <- r + 1, and
        weights and optimizer state finite: skip the step;  else: take those of the newest intact rolling checkpoint
Source: Transformer Encoder Frankenstein, algorithm 1. Going back takes the weights and the optimizer's state, not the
position: the run goes on with the next batch, as in Chowdhery et al. 2022 (PaLM), section 5.1,
https://arxiv.org/abs/2204.02311; the batches in between would bring the same failure again.
"""

import logging
from typing import NoReturn

from frankenstein.training.checkpoints import CheckpointError, torch_generators
from frankenstein.training.emergency import REPLAY, BadStep, save_emergency
from frankenstein.training.guard import TrainingStopped
from frankenstein.training.inspection import Inspection, describe
from frankenstein.training.readings import Reading
from frankenstein.training.run import Run

logger = logging.getLogger(__name__)
_LISTED = 5


class Recovery:
    """Keeps a run's weights finite; every trouble uses one of `max_nan_retries` and leaves one emergency folder."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def after_reading(self, readings: list[Reading]) -> bool:
        """Deal with what was read; returns whether the newest step must not move the weights.

        Raises:
            TrainingStopped: when the retries are used up, or there is nothing to go back to.
        """
        bad = [reading for reading in readings if reading.values["unstable"]]
        if not bad:
            return bool(readings[-1].values["skipped"])
        lost = self._lost()
        first = bad[0]
        found = self._dump(BadStep(first.record.step - 1, first.values, first.record.generators))
        for reading in bad[:1] if lost else bad:  # with bad weights, every later step is the same trouble
            self._count(reading.record.step, reading.values, found)
        if lost:
            self._go_back(first.record.step, lost)
        return bool(lost) or bool(readings[-1].values["skipped"])

    def before_saving(self) -> None:
        """Go back if the last update made NaN or Inf of a weight or of the optimizer's state: no checkpoint gets those.

        Raises:
            TrainingStopped: as above.
        """
        run = self.run
        lost = self._lost()
        if not lost:
            return
        found = self._dump(BadStep(run.state.step, {}, torch_generators()))
        self._count(run.state.step, {}, found)
        self._go_back(run.state.step, lost)

    def _lost(self) -> list[str]:
        """Weights that hold NaN or Inf in any process."""
        run = self.run
        return run.processes.union(run.trained.not_finite())

    def _dump(self, bad: BadStep) -> str:
        """What the emergency folder says, in a sentence or two; the first of several processes writes it."""
        if not self.run.parallel.whole:  # all are needed for the state
            return self._write(bad)
        return self.run.processes.same(lambda: self._write(bad))

    def _write(self, bad: BadStep) -> str:
        try:
            folder, seen = save_emergency(self.run, bad)
        except CheckpointError as error:  # the trouble itself is the news
            return f"{error}."
        first = describe(seen.first_bad) if isinstance(seen, Inspection) else seen
        again = "" if self.run.objective.recipe() is None else f"; run it again: {REPLAY} {folder}"
        return f"First not finite: {first}. State before the step, its batch and notes.json: {folder}{again}"

    def _count(self, step: int, values: dict[str, float], found: str) -> None:
        run, limit = self.run, self.run.settings.max_nan_retries
        numbers = ""
        if values:
            before, after = values["grad_norm_before_clip"], values["grad_norm"]
            numbers = f"loss {values['loss']:g}, gradient norm {before:g} ({after:g} after clipping); "
        run.state.unstable += 1
        if run.state.unstable > limit:
            raise TrainingStopped(
                f"{run.label}: training stopped at step {step}: {numbers}"
                f"{run.state.unstable} unstable steps, max_nan_retries allows {limit}. {found}"
            )
        logger.warning(
            "%s: step %d is unstable: %s%d of %d retries used. %s",
            run.label, step, numbers, run.state.unstable, limit, found,
        )  # fmt: skip

    def _go_back(self, step: int, lost: list[str]) -> None:
        run = self.run
        names = ", ".join(lost[:_LISTED]) + (f" and {len(lost) - _LISTED} more" if len(lost) > _LISTED else "")
        earlier = run.checkpoints.restore(run.trained, generators=False)
        if earlier is None:
            self._nothing_to_go_back_to(step, names)
        logger.warning(
            "%s: not finite after step %d: %s; weights and optimizer state are those of step %d again, "
            "training goes on with the next batch",
            run.label, step, names, earlier.step,
        )  # fmt: skip

    def _nothing_to_go_back_to(self, step: int, names: str) -> NoReturn:
        raise TrainingStopped(
            f"{self.run.label}: training stopped at step {step}: not finite: {names}; "
            "there is no intact rolling checkpoint to go back to (checkpoint_every_n_steps: "
            f"{self.run.settings.checkpoint_every_n_steps})"
        )
