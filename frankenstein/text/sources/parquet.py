"""Parquet files, read in batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from frankenstein.errors import FrankensteinError
from frankenstein.text.sources.lines import open_binary
from frankenstein.text.sources.rows import Rows, pick_columns

_MAGIC = b"PAR1"


def open_parquet(file: Path) -> pq.ParquetFile:
    """An open parquet file; FrankensteinError tells a damaged one from one that is no parquet at all."""
    with open_binary(file) as stream:
        magic = stream.read(len(_MAGIC))
    try:
        # The buffer bounds the memory of files with one huge row group.
        return pq.ParquetFile(file, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        what = "truncated or damaged" if magic == _MAGIC else f"not a parquet file (starts with {magic!r})"
        raise FrankensteinError(f"{file}: {what}: {_first_line(error)}") from None


def count_parquet(file: Path) -> int:
    """Rows of a parquet file, from its footer."""
    with open_parquet(file) as source:
        return int(source.metadata.num_rows)


def read_parquet(file: Path, required: Sequence[str], optional: Sequence[str], batch_size: int) -> Iterator[Rows]:
    """Every row of the file. Text columns come as bytes, so that invalid UTF-8 is found with its row."""
    with open_parquet(file) as source:
        names = pick_columns(str(file), source.schema_arrow.names, required, optional)
        first = 1
        try:
            for batch in source.iter_batches(batch_size, columns=names, use_threads=False):
                columns = {name: _values(batch.column(name)) for name in names}
                yield Rows(str(file), "row", range(first, first + batch.num_rows), columns)
                first += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise FrankensteinError(f"{file}: damaged after row {first - 1}: {_first_line(error)}") from None


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    return list(column.to_pylist())


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
