"""Comma-separated files with a header row, quoted as RFC 4180 says."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from frankenstein.errors import FrankensteinError
from frankenstein.text.sources.lines import utf8_lines
from frankenstein.text.sources.rows import Rows, in_batches, pick_columns, rows_of

_LONGEST_FIELD = 2**31 - 1  # characters; the module's own limit of 131072 would refuse a long document


def count_csv(file: Path) -> int:
    """Records of a CSV file, without the header and blank lines."""
    return sum(1 for _ in _records(file)) - 1


def read_csv(file: Path, required: Sequence[str], optional: Sequence[str], batch_size: int) -> Iterator[Rows]:
    """Every record as one row; its number is that of the line it ends on."""
    records = _records(file)
    _, header = next(records)
    names = pick_columns(str(file), header, required, optional)
    positions = [header.index(name) for name in names]
    values = ((line, tuple(record[p] for p in positions)) for line, record in records)
    for batch in in_batches(values, batch_size):
        yield rows_of(str(file), "line", names, batch)


def _records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of the header and of every record; all have as many fields as the header."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader((line for _, line in utf8_lines(file)), strict=True)
    width = 0
    try:
        for record in reader:
            if not record:
                continue
            width = width or len(record)
            if len(record) != width:
                raise FrankensteinError(
                    f"{file}: line {reader.line_num}: {len(record)} fields, the header has {width}; "
                    'a text with a comma, quote or line break stands in "double quotes"'
                )
            yield reader.line_num, record
    except csv.Error as error:
        raise FrankensteinError(f"{file}: line {reader.line_num}: not valid CSV: {error}") from None
    if not width:
        raise FrankensteinError(f"{file}: empty file; expected CSV with a header row")
