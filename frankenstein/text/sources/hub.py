"""Hugging Face datasets, streamed."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from frankenstein.errors import FrankensteinError
from frankenstein.text.sources.rows import Rows, pick_columns

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubAccess:
    """Where hub data may already lie; the fields of the same names in the training section say more."""

    cache_dir: str = "data/.hub"
    local_parquet_dir: str | None = None
    prefer_local_cache: bool = True


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset on the hub (or of a local folder that `datasets` can read)."""

    name: str
    config: str | None
    split: str

    def read(self, cache_dir: str, required: Sequence[str], batch_size: int) -> Iterator[Rows]:
        """Every row of the streamed split, in the hub's order.

        Raises:
            FrankensteinError: when the dataset cannot be reached or has not the columns.
        """
        file = f"hub/{self.name}"
        try:
            first = 1
            for batch in self._stream(cache_dir).iter(batch_size=batch_size):
                names = pick_columns(file, sorted(batch), required, ())
                numbers = range(first, first + len(batch[names[0]]))
                yield Rows(file, "row", numbers, {name: batch[name] for name in names})
                first += len(numbers)
        except FrankensteinError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise FrankensteinError(
                f"{file} (config {self.config or 'default'}, split {self.split}): cannot be read: {reason}"
            ) from error

    def _stream(self, cache_dir: str) -> Any:
        try:
            from datasets import load_dataset
        except ImportError:
            raise FrankensteinError("data.source: hub needs the package datasets: pip install datasets") from None
        _log.info("streaming %s from the hub", self.name)
        return load_dataset(self.name, self.config, split=self.split, streaming=True, cache_dir=cache_dir)
