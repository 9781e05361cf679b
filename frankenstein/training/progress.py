"""Progress of a loop: one updating bar on a terminal, plain lines every so many steps elsewhere."""

import logging
import sys
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)


class Progress:
    """Context manager that reports steps.

    Args:
        label: what runs.
        total: steps in all.
        done: steps that an earlier run has finished.
        every: steps between plain lines; the last one always has one.
        shown: report at all.
    """

    def __init__(self, label: str, *, total: int, done: int, every: int, shown: bool = True) -> None:
        self.label, self.total, self.every = label, total, every
        terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=label, unit="step", dynamic_ncols=True) if terminal else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, step: int, values: dict[str, float], *, last: bool = False) -> None:
        """Show that `step` steps are done (`last`: and no more follow); `values` are printed with 4 digits."""
        shown = " ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif last or step % self.every == 0 or step == self.total:
            logger.info("%s: step %d/%d %s", self.label, step, self.total, shown)
