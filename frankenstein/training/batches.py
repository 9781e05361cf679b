"""Batches prepared ahead by background threads, always handed out in the same order."""

import dataclasses
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

Make = Callable[[int, int], Any]


def batch_stream(make: Make, *, first_step: int, steps: int, per_step: int, workers: int) -> Generator[Any, None, None]:
    """Yield make(step, micro) for steps first_step..steps-1 and micro 0..per_step-1.

    Args:
        make: a pure function, called from several threads when there are workers.
        workers: threads; each keeps up to two batches ready. 0 makes every batch when it is asked for.
    """
    keys = ((step, micro) for step in range(first_step, steps) for micro in range(per_step))
    if workers == 0:
        for step, micro in keys:
            yield make(step, micro)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
        ready: deque[Future[Any]] = deque()
        try:
            for step, micro in keys:
                ready.append(pool.submit(make, step, micro))
                if len(ready) > 2 * workers:
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def pinned(batch: Any) -> Any:
    """A batch, a dataclass or named tuple, with its tensors in page-locked memory.

    Copies from there to a GPU run beside its other work and do not hold up the program.
    """
    if isinstance(batch, Tensor):
        return batch.pin_memory()
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(pinned, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [field.name for field in dataclasses.fields(batch)]
        return dataclasses.replace(batch, **{name: pinned(getattr(batch, name)) for name in fields})
    return batch
