"""Parquet with fixed writer settings: the same rows give the same bytes, whatever the batches they came in."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CORPUS_SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("source", pa.string())])
_GROUP_ROWS = 1024
_GROUP_CHARS = 1 << 22  # bounds the memory of writer and reader when rows are long


def open_writer(file: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A parquet writer whose settings never vary."""
    return pq.ParquetWriter(
        file,
        schema,
        compression="zstd",
        compression_level=3,
        version="2.6",
        use_dictionary=False,
        write_statistics=False,
    )


def string_array(texts: Sequence[str]) -> pa.Array:
    """An arrow array of texts (at most 2 GiB); made from buffers, because `pa.array` would import pandas."""
    encoded = [text.encode("utf-8") for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    assert ends[-1] < 2**31, "offsets of an arrow string array have 32 bits"
    buffers = pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(encoded))
    return pa.StringArray.from_buffers(len(encoded), *buffers)


class CorpusWriter:
    """Writes documents into `corpus-00000.parquet`, `corpus-00001.parquet`, ... of `rows_per_shard` rows.

    Row groups are bounded in rows and characters and depend only on the documents.
    """

    def __init__(self, folder: Path, rows_per_shard: int) -> None:
        self.folder, self.rows_per_shard = folder, rows_per_shard
        self.shards: list[str] = []
        self._pending: list[tuple[str, str, str]] = []
        self._pending_chars = self._shard_rows = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, id: str, text: str, source: str) -> None:
        """Append one document."""
        self._pending.append((id, text, source))
        self._pending_chars += len(text)
        full = self._shard_rows + len(self._pending) == self.rows_per_shard
        if full or len(self._pending) == _GROUP_ROWS or self._pending_chars >= _GROUP_CHARS:
            self._write_group()
        if full:
            self.close()

    def close(self) -> None:
        """Finish the current shard."""
        self._write_group()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._shard_rows = 0

    def _write_group(self) -> None:
        if not self._pending:
            return
        if self._writer is None:
            self.shards.append(f"corpus-{len(self.shards):05d}.parquet")
            self._writer = open_writer(self.folder / self.shards[-1], CORPUS_SCHEMA)
        columns = [string_array(column) for column in zip(*self._pending, strict=True)]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=CORPUS_SCHEMA))
        self._shard_rows += len(self._pending)
        self._pending, self._pending_chars = [], 0


def row_groups(folder: Path, shards: list[str]) -> list[tuple[Path, int]]:
    """(shard file, row group) of a cached corpus, in order."""
    groups = []
    for name in shards:
        with pq.ParquetFile(folder / name) as source:
            groups += [(folder / name, k) for k in range(source.num_row_groups)]
    return groups


def read_group(file: Path, group: int, columns: list[str]) -> list[list[str]]:
    """The values of some columns of one row group."""
    with pq.ParquetFile(file) as source:
        table = source.read_row_group(group, columns=columns, use_threads=False)
        return [table.column(name).to_pylist() for name in columns]


def cached_texts(folder: Path, shards: list[str]) -> Iterator[str]:
    """Every text of a cached corpus, in order, one row group in memory at a time."""
    for file, group in row_groups(folder, shards):
        yield from read_group(file, group, ["text"])[0]
