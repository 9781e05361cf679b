"""The evaluation sets a user brings: `<task>` or `<task>_<language>` folders with train, dev and test files."""

import logging
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from frankenstein.errors import FrankensteinError
from frankenstein.tasks.registry import TASKS, Task
from frankenstein.text.normalize import clean
from frankenstein.text.options import SAMPLE_TASKS_PATH, DataOptions
from frankenstein.text.pairs import SPLITS, Pairs
from frankenstein.text.sources.corpus import FORMATS, Format
from frankenstein.text.sources.rows import Rows

_log = logging.getLogger(__name__)
_FORMATS = [FORMATS[name] for name in ("parquet", "csv", "jsonl")]
_SAMPLE_TASKS = ("pawsx", "stsb", "xnli")


def task_splits(data: DataOptions, *, seed: int, batch_size: int) -> Iterator[tuple[str, str, Pairs]]:
    """(task, split, pairs) of everything at data.tasks_path, one split in memory at a time.

    Raises:
        FrankensteinError: naming file and row of the first pair that a task cannot have.
    """
    if data.tasks_path == SAMPLE_TASKS_PATH:
        yield from _sample_splits(data, seed)
        return
    for task, folder in find_tasks(data.tasks_path).items():
        for split, file, kind in _split_files(folder):
            yield task, split, _read_split(task, split, file, kind, batch_size)


def find_tasks(path: str | Path) -> dict[str, Path]:
    """Registered task -> its folder inside `path`; other folders are left alone."""
    place = Path(path)
    if not place.is_dir():
        raise FrankensteinError(f"data.tasks_path: {place}: no such folder; expected a folder with one folder a task")
    found: dict[str, Path] = {}
    for folder in sorted(p for p in place.iterdir() if p.is_dir()):
        task = _task_of(folder.name)
        if task is None:
            _log.info("%s is no known task; left out", folder)
        elif task in found:
            raise FrankensteinError(
                f"data.tasks_path: two folders for the task {task}: {found[task]} and {folder}; keep one"
            )
        else:
            found[task] = folder
    if not found:
        names = ", ".join(TASKS)
        raise FrankensteinError(
            f"data.tasks_path: {place}: no task folder; expected <task> or <task>_<language>, tasks: {names}"
        )
    return dict(sorted(found.items()))


def _task_of(folder: str) -> str | None:
    matches = [task for task in TASKS if folder == task or folder.startswith(f"{task}_")]
    return max(matches, key=len, default=None)


def _split_files(folder: Path) -> list[tuple[str, Path, Format]]:
    found = []
    for split in SPLITS:
        files = [(folder / f"{split}{kind.suffix}", kind) for kind in _FORMATS]
        present = [(file, kind) for file, kind in files if file.is_file()]
        if len(present) > 1:
            raise FrankensteinError(
                f"{folder}: {' and '.join(f.name for f, _ in present)} hold the same split; keep one"
            )
        found += [(split, file, kind) for file, kind in present]
    if not found:
        raise FrankensteinError(
            f"{folder}: no train, dev or test file; expected one of .parquet, .csv, .jsonl for each split"
        )
    return found


def _read_split(task: str, split: str, file: Path, kind: Format, batch_size: int) -> Pairs:
    column = TASKS[task].column()
    pairs = Pairs([], [], [], np.empty(0))
    targets: list[float] = []
    for rows in kind.read(file, ("sentence1", "sentence2", column), ("id",), batch_size):
        pairs.first.extend(_sentences(rows, "sentence1"))
        pairs.second.extend(_sentences(rows, "sentence2"))
        targets += [_target(TASKS[task], value, rows.place(i)) for i, value in enumerate(rows.columns[column])]
        start = len(pairs.ids) + 1
        numbered = [f"{task}:{split}:{n}" for n in range(start, start + len(rows))]
        pairs.ids.extend(rows.strings("id") if "id" in rows.columns else numbered)
    if not pairs.ids:
        raise FrankensteinError(f"{file}: no rows; expected at least one pair")
    repeated = [id for id, n in Counter(pairs.ids).items() if n > 1]
    if repeated:
        listing = ", ".join(repr(id) for id in repeated[:5])
        raise FrankensteinError(
            f"{file}: column 'id': {len(repeated)} id(s) occur more than once: {listing}; expected unique ids"
        )
    kind_of_target = np.int64 if column == "label" else np.float64
    return Pairs(pairs.ids, pairs.first, pairs.second, np.array(targets, kind_of_target))


def _sentences(rows: Rows, column: str) -> list[str]:
    texts = [clean(text) for text in rows.strings(column)]
    for i, text in enumerate(texts):
        if not text:
            raise FrankensteinError(f"{rows.place(i)}: column {column!r} is empty; expected a sentence")
    return texts


def _target(task: type[Task], value: Any, place: str) -> float:
    """A label or score that the task allows; CSV gives numbers as text."""
    if task.labels:
        label = _number(value, int, place, "label", "an integer")
        if not 0 <= label < len(task.labels):
            allowed = ", ".join(f"{i} {name}" for i, name in enumerate(task.labels))
            raise FrankensteinError(f"{place}: column 'label': found {label}; allowed: {allowed}")
        return label
    assert task.score_range is not None
    score, (low, high) = _number(value, float, place, "score", "a number"), task.score_range
    if not (math.isfinite(score) and low <= score <= high):
        raise FrankensteinError(f"{place}: column 'score': found {score}; expected a number from {low:g} to {high:g}")
    return score


def _number(value: Any, kind: type[int] | type[float], place: str, column: str, wanted: str) -> float:
    allowed = (int, str) if kind is int else (int, float, str)
    if value is None or isinstance(value, bool) or not isinstance(value, allowed):
        found = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise FrankensteinError(f"{place}: column {column!r}: found {found}; expected {wanted}")
    try:
        return kind(value)
    except (ValueError, OverflowError):
        raise FrankensteinError(f"{place}: column {column!r}: found {str(value)[:40]!r}; expected {wanted}") from None


def _sample_splits(data: DataOptions, seed: int) -> Iterator[tuple[str, str, Pairs]]:
    from frankenstein.text.sample import generate

    for task in _SAMPLE_TASKS:
        for split in SPLITS:
            size = data.sample_pairs if split == "train" else data.sample_eval_pairs
            first, second, targets = zip(*generate.pairs(task, split, size, seed), strict=True)
            ids = [f"{task}:{split}:{n}" for n in range(1, len(first) + 1)]
            yield task, split, Pairs(ids, list(first), list(second), np.array(targets))
