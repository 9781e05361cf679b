"""Sentences and sentence pairs in a user's files: txt, csv, jsonl and parquet."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from frankenstein.artifact import sha256
from frankenstein.errors import FrankensteinError
from frankenstein.sentence.pairs import PairData
from frankenstein.text.pairs import Pairs
from frankenstein.text.sources.csv_file import read_csv
from frankenstein.text.sources.lines import read_jsonl, read_text
from frankenstein.text.sources.parquet import read_parquet
from frankenstein.text.sources.rows import Rows

_BATCH = 1024
_READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str], int], Iterator[Rows]]] = {
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def read_texts(path: Path, column: str = "text") -> Iterator[tuple[str, str]]:
    """(id, sentence) of each line of a txt file, or of each row of a csv, jsonl or parquet file.

    The id is the column `id` where there is one, else the row's number in the file. Blank sentences are passed over.
    Raises:  FrankensteinError: naming file, row, what was found and what is expected.
    """
    for rows in _read(path, [column], ["id"]):
        for identity, text in zip(_ids(rows), rows.strings(column), strict=True):
            if text.strip():
                yield identity, text.strip()


def read_sentence_pairs(path: Path) -> list[tuple[str, str]]:
    """The columns sentence1 and sentence2 of a csv, jsonl or parquet file."""
    found: list[tuple[str, str]] = []
    for rows in _read(path, ["sentence1", "sentence2"], []):
        found += zip(rows.strings("sentence1"), rows.strings("sentence2"), strict=True)
    return found


def read_scored_pairs(path: Path) -> Pairs:
    """Pairs of a csv, jsonl or parquet file with sentence1, sentence2 and score, the wanted cosine from -1 to 1.

    Raises:  FrankensteinError: naming file, row, what was found and what is expected; also for a file without pairs.
    """
    ids: list[str] = []
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    for rows in _read(path, ["sentence1", "sentence2", "score"], ["id"]):
        ids += _ids(rows)
        first += rows.strings("sentence1")
        second += rows.strings("sentence2")
        scores += (_score(rows, position) for position in range(len(rows)))
    if not ids:
        raise FrankensteinError(f"{path}: has no pairs")
    return Pairs(ids, first, second, np.array(scores, dtype=np.float32))


def file_data(train: Path, dev: Path | None = None) -> PairData:
    """Training pairs, and development pairs where a file is given, for `finetune`."""
    files = [train] if dev is None else [train, dev]
    digest = " ".join(sha256(path) for path in files if path.is_file())
    pairs = read_scored_pairs(train)
    return PairData(pairs, (len(pairs),), {} if dev is None else {"dev": read_scored_pairs(dev)}, digest)


def _read(path: Path, required: list[str], optional: list[str]) -> Iterator[Rows]:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise FrankensteinError(f"{path}: found the file type {suffix or 'none'!r}; expected {', '.join(_READERS)}")
    if not path.is_file():
        raise FrankensteinError(f"{path}: no such file")
    return _READERS[suffix](path, required, optional, _BATCH)


def _ids(rows: Rows) -> list[str]:
    given = rows.columns.get("id")
    if given is None:
        return [str(number) for number in rows.numbers]
    return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in given]


def _score(rows: Rows, position: int) -> float:
    found = rows.columns["score"][position]
    try:
        score = float(found)
    except (TypeError, ValueError):
        score = math.nan
    if not -1.0 <= score <= 1.0:
        raise FrankensteinError(
            f"{rows.place(position)}: column 'score': found {found!r}; expected a number from -1 to 1"
        )
    return score
