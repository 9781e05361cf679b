"""Files of lines: plain text (one document a line) and JSON lines."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from frankenstein.errors import FrankensteinError
from frankenstein.text.sources.rows import Rows, in_batches, not_utf8, pick_columns, rows_of


def open_binary(file: Path) -> BinaryIO:
    """The file opened for reading bytes; FrankensteinError when that fails."""
    try:
        return file.open("rb")
    except OSError as error:
        raise FrankensteinError(f"{file}: cannot be read: {error.strerror}") from None


def utf8_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end) of a UTF-8 file; only \\n ends a line, a byte order mark is dropped.

    Raises:
        FrankensteinError: naming file, line and byte offset in the file of the first byte that is not UTF-8.
    """
    offset = 0
    with open_binary(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise not_utf8(f"{file}: line {number}", line, error.start, offset + error.start) from None
            offset += len(line)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def count_lines(file: Path) -> int:
    """Lines of a text file; an unfinished last line counts."""
    with open_binary(file) as stream:
        return sum(1 for _ in stream)


def read_text(file: Path, required: Sequence[str], optional: Sequence[str], batch_size: int) -> Iterator[Rows]:
    """Every line as one row; a text file has one column, which takes the name that is asked for."""
    if len(required) != 1:
        raise FrankensteinError(f"{file}: a text file has only the text; no column {required[-1]!r}")
    lines = ((number, (line.rstrip("\r\n"),)) for number, line in utf8_lines(file))
    for batch in in_batches(lines, batch_size):
        yield rows_of(str(file), "line", required, batch)


def count_jsonl(file: Path) -> int:
    """Lines of a JSON-lines file that are not blank."""
    with open_binary(file) as stream:
        return sum(1 for line in stream if line.strip())


def read_jsonl(file: Path, required: Sequence[str], optional: Sequence[str], batch_size: int) -> Iterator[Rows]:
    """Every line that is not blank as one row, its keys as columns; an optional key counts if the first row has it."""
    names: list[str] = []

    def values() -> Iterator[tuple[int, tuple[Any, ...]]]:
        for number, line in utf8_lines(file):
            if line.strip():
                entry = _json_object(file, number, line)
                place = f"{file}: line {number}"
                names[:] = names or pick_columns(place, list(entry), required, optional)
                pick_columns(place, list(entry), names, ())
                yield number, tuple(entry[name] for name in names)

    for batch in in_batches(values(), batch_size):
        yield rows_of(str(file), "line", names, batch)


def _json_object(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FrankensteinError(f"{file}: line {number}: not valid JSON: {error}") from None
    if not isinstance(entry, dict):
        raise FrankensteinError(
            f"{file}: line {number}: found a JSON {type(entry).__name__}; expected an object with keys"
        )
    return entry
