"""Evaluation pairs inside a corpus cache."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from frankenstein.tasks.registry import TASKS
from frankenstein.text.parquet_folder import open_writer, string_array

SPLITS = ("train", "dev", "test")
_GROUP_ROWS = 4096


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs of one split; `targets` (n,) are int64 labels or float64 scores."""

    ids: list[str]
    first: list[str]
    second: list[str]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def read_pairs(cache: str | Path, task: str, split: str) -> Pairs | None:
    """The pairs of one split of a task, or None when the cache has none."""
    column = TASKS[task].column()
    file = _file(Path(cache), task, split)
    if not file.is_file():
        return None
    table = pq.read_table(file, use_threads=False)
    first, second = table.column("sentence1").to_pylist(), table.column("sentence2").to_pylist()
    targets = table.column(column).to_numpy()
    return Pairs(
        table.column("id").to_pylist(), first, second, targets.astype(np.int64 if column == "label" else np.float64)
    )


def write_pairs(cache: Path, task: str, split: str, pairs: Pairs) -> None:
    """Store one split in a cache folder."""
    column = TASKS[task].column()
    kind, numpy_kind = (pa.int32(), np.int32) if column == "label" else (pa.float32(), np.float32)
    schema = pa.schema([(name, pa.string()) for name in ("id", "sentence1", "sentence2")] + [(column, kind)])
    file = _file(cache, task, split)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_writer(file, schema) as writer:
        for start in range(0, len(pairs), _GROUP_ROWS):
            group = slice(start, start + _GROUP_ROWS)
            texts = [string_array(column[group]) for column in (pairs.ids, pairs.first, pairs.second)]
            values = np.ascontiguousarray(pairs.targets[group], numpy_kind)
            targets = pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
            writer.write_batch(pa.RecordBatch.from_arrays([*texts, targets], schema=schema))


def _file(cache: Path, task: str, split: str) -> Path:
    return cache / "tasks" / task / f"{split}.parquet"
