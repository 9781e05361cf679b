"""Batches of raw rows, and the checks that every source shares: column names, types, nulls, Unicode."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from frankenstein.errors import FrankensteinError
from frankenstein.registry import nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one file, as columns of plain Python values.

    Fields:
        file: name for messages.
        unit: what a number counts, "row" or "line"; both start at 1.
        numbers: number of each row in the file.
        columns: values by column name; all lists have the length of `numbers`.
    """

    file: str
    unit: str
    numbers: Sequence[int]
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, positions: Iterable[int]) -> "Rows":
        """The rows at these positions of the batch."""
        kept = list(positions)
        columns = {name: [values[i] for i in kept] for name, values in self.columns.items()}
        return Rows(self.file, self.unit, [self.numbers[i] for i in kept], columns)

    def place(self, position: int) -> str:
        """`file: row 17`, for messages."""
        return f"{self.file}: {self.unit} {self.numbers[position]}"

    def strings(self, column: str) -> list[str]:
        """A column as valid Unicode text.

        Raises:
            FrankensteinError: naming the row of the first null, value of another type, or text that is not UTF-8.
        """
        values = [v if isinstance(v, str) else self._decoded(column, i, v) for i, v in enumerate(self.columns[column])]
        try:
            "".join(values).encode("utf-8")
        except UnicodeEncodeError:
            for i, value in enumerate(values):
                self._refuse_surrogates(column, i, value)
        return values

    def _decoded(self, column: str, position: int, value: Any) -> str:
        if value is None:
            raise FrankensteinError(f"{self.place(position)}: column {column!r} is null; expected text")
        if not isinstance(value, bytes):
            found = f"{type(value).__name__} {str(value)[:40]!r}"
            raise FrankensteinError(f"{self.place(position)}: column {column!r} holds {found}; expected text")
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"{self.place(position)}: column {column!r}"
            raise not_utf8(place, value, error.start, error.start) from None

    def _refuse_surrogates(self, column: str, position: int, value: str) -> None:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise FrankensteinError(
                f"{self.place(position)}: column {column!r} holds the lone surrogate U+{ord(value[error.start]):04X} "
                f"at character {error.start}; expected valid Unicode"
            ) from None


def not_utf8(place: str, data: bytes, position: int, offset: int) -> FrankensteinError:
    """The error for bytes that are not UTF-8: `position` is where in `data`, `offset` what the user can look up."""
    return FrankensteinError(
        f"{place}: byte 0x{data[position]:02x} at byte offset {offset} is not UTF-8; "
        "expected UTF-8 (Latin-1 files: iconv -f latin1 -t utf-8)"
    )


def pick_columns(file: str, known: Sequence[str], required: Sequence[str], optional: Sequence[str]) -> list[str]:
    """The columns to read; FrankensteinError names what exists when a required one is missing."""
    for name in required:
        if name not in known:
            listing = ", ".join(known) if known else "none"
            raise FrankensteinError(f"{file}: no column {name!r}; columns: {listing}{nearest(name, list(known))}")
    return [*required, *(name for name in optional if name in known and name not in required)]


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of at most `size` consecutive items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def rows_of(file: str, unit: str, names: Sequence[str], batch: list[tuple[int, tuple[Any, ...]]]) -> Rows:
    """A batch of (number, values in the order of `names`) as Rows."""
    columns = {name: [values[k] for _, values in batch] for k, name in enumerate(names)}
    return Rows(file, unit, [number for number, _ in batch], columns)
