"""The step log: one CSV row an optimizer step, continued without duplicates by a resumed run."""

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from frankenstein.artifact import write_text
from frankenstein.errors import FrankensteinError


class StepLog:
    """A CSV file with a fixed header; every row is on disk when `write` returns.

    Args:
        path: the file; None keeps no log.
        columns: the header.
        done: finished steps of the run; later rows in the file are dropped, and all rows when it is 0.
        rotate: a file of other columns is moved to <name>.1.csv (or the next free number); False raises.
    Raises:
        FrankensteinError: when the file has other columns and may not be moved, or cannot be written.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], *, done: int, rotate: bool) -> None:
        self.path, self.columns = path, list(columns)
        if path is None:
            return
        try:
            kept = self._rows_to_keep(path, done, rotate) if path.exists() else []
            write_text(path, "".join(_line(row) for row in [self.columns, *kept]))
        except OSError as error:
            raise _unwritable(path, error) from error

    def _rows_to_keep(self, path: Path, done: int, rotate: bool) -> list[list[str]]:
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = [*csv.reader(stream)] or [[]]
        if header and header != self.columns:
            if not rotate:
                raise FrankensteinError(
                    f"{path}: has the columns {', '.join(header)}; expected {', '.join(self.columns)}. "
                    "Move the file away, or set csv_rotate_on_schema_change: true"
                )
            path.rename(_free_name(path))
            return []
        at = self.columns.index("global_step")
        whole = [row for row in rows if len(row) == len(self.columns) and row[at].isdigit()]
        return [row for row in whole if int(row[at]) <= done]

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; a column without a value stays empty, numbers have 7 digits."""
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8", newline="") as stream:
                stream.write(_line([_text(row.get(name)) for name in self.columns]))
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _unwritable(path: Path, error: OSError) -> FrankensteinError:
    return FrankensteinError(f"{path}: the step log could not be written: {error.strerror or error}")


def _line(values: list[str]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerow(values)
    return stream.getvalue()


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)


def _free_name(path: Path) -> Path:
    number = 1
    while (moved := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return moved


def now() -> str:
    """The time, ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
