"""The corpus of an experiment: which source, which files, and which of their rows."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from frankenstein.errors import FrankensteinError
from frankenstein.text.options import DataOptions
from frankenstein.text.sources.csv_file import count_csv, read_csv
from frankenstein.text.sources.hub import HubAccess, HubDataset
from frankenstein.text.sources.lines import count_jsonl, count_lines, read_jsonl, read_text
from frankenstein.text.sources.parquet import count_parquet, read_parquet
from frankenstein.text.sources.rows import Rows, in_batches

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """A kind of local file: its ending, how many rows it has, and its rows.

    `read(file, required columns, optional columns, batch size)` yields all rows in order.
    """

    suffix: str
    count: Callable[[Path], int]
    read: Callable[[Path, Sequence[str], Sequence[str], int], Iterator[Rows]]


FORMATS = {
    "parquet": Format(".parquet", count_parquet, read_parquet),
    "text": Format(".txt", count_lines, read_text),
    "jsonl": Format(".jsonl", count_jsonl, read_jsonl),
    "csv": Format(".csv", count_csv, read_csv),
}


@dataclass(frozen=True)
class Reading:
    """How much is read, and how.

    Fields:
        max_samples: most documents; see `even_sample` for which ones.
        batch_size: rows held at once.
        whole_files: read each parquet file at once instead of in batches.
        hub: where hub data may already lie.
    """

    max_samples: int
    batch_size: int
    whole_files: bool = False
    hub: HubAccess = field(default_factory=HubAccess)


def read_corpus(data: DataOptions, reading: Reading, *, seed: int) -> Iterator[Rows]:
    """Batches of the corpus rows with the columns data.text_column and data.id_column.

    Local files: when they hold more than max_samples rows, an even sample over all of them. The generated sample and
    the hub: the first max_samples rows.
    Raises:
        FrankensteinError: for a missing, damaged or wrongly typed file, naming file and row.
    """
    columns = [data.text_column] if data.id_column is None else [data.text_column, data.id_column]
    if data.source == "sample":
        return _sample(data, reading, seed)
    if data.source != "hub":
        return _local(list_files(data.path, data.source, "data.path"), FORMATS[data.source], columns, reading, seed)
    local = reading.hub.local_parquet_dir
    if local is not None and reading.hub.prefer_local_cache and any(Path(local).glob("*.parquet")):
        _log.info("reading %s instead of the hub", local)
        return _local(
            list_files(local, "parquet", "training.local_parquet_dir"), FORMATS["parquet"], columns, reading, seed
        )
    if data.hub_name is None:
        raise FrankensteinError("data.hub_name: found null; source hub needs the name of a dataset")
    dataset = HubDataset(data.hub_name, data.hub_config, data.hub_split)
    return _first(dataset.read(reading.hub.cache_dir, columns, reading.batch_size), reading.max_samples)


def list_files(path: str | Path, kind: str, key: str) -> list[Path]:
    """The file itself, or the files of this kind directly in a folder, sorted by name."""
    place, suffix = Path(path), FORMATS[kind].suffix
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise FrankensteinError(f"{key}: {place}: no such file or folder")
    files = sorted(p for p in place.glob(f"*{suffix}") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise FrankensteinError(
            f"{key}: {place}: the folder holds no {suffix} file; data.source: {kind} needs at least one"
        )
    return files


def even_sample(total: int, wanted: int, seed: int) -> np.ndarray:
    """`wanted` sorted row numbers of 0..total-1: one seeded choice in each of `wanted` equal stretches.

    Every genre of a corpus that is sorted by file keeps its share, and a periodic corpus is not hit in step.
    """
    if wanted >= total:
        return np.arange(total)
    edges = np.arange(wanted + 1, dtype=np.int64) * total // wanted
    return np.random.Generator(np.random.Philox(seed)).integers(edges[:-1], edges[1:])


def _local(files: list[Path], kind: Format, columns: list[str], reading: Reading, seed: int) -> Iterator[Rows]:
    counts = [kind.count(file) for file in files]  # here, not in the generator: a damaged file is found at once
    wanted = even_sample(sum(counts), reading.max_samples, seed)
    return _chosen(list(zip(files, counts, strict=True)), kind, columns, reading, wanted)


def _chosen(
    files: list[tuple[Path, int]], kind: Format, columns: list[str], reading: Reading, wanted: np.ndarray
) -> Iterator[Rows]:
    start = 0
    for file, rows in files:
        low, high = np.searchsorted(wanted, [start, start + rows])
        if high > low:
            size = max(rows, 1) if reading.whole_files else reading.batch_size
            yield from _kept(kind.read(file, columns, (), size), wanted[low:high] - start)
        start += rows


def _kept(batches: Iterator[Rows], wanted: np.ndarray) -> Iterator[Rows]:
    """The rows of one file at the sorted positions `wanted`."""
    start = 0
    for rows in batches:
        low, high = np.searchsorted(wanted, [start, start + len(rows)])
        if high - low == len(rows):
            yield rows
        elif high > low:
            yield rows.take((wanted[low:high] - start).tolist())
        start += len(rows)


def _first(batches: Iterator[Rows], most: int) -> Iterator[Rows]:
    for rows in batches:
        if len(rows) >= most:
            yield rows.take(range(most))
            return
        most -= len(rows)
        yield rows


def _sample(data: DataOptions, reading: Reading, seed: int) -> Iterator[Rows]:
    from frankenstein.text.sample import generate

    sentences = generate.corpus(min(data.sample_sentences, reading.max_samples), seed)
    for k, batch in enumerate(in_batches(sentences, reading.batch_size)):
        first = k * reading.batch_size + 1
        yield Rows("sample", "row", range(first, first + len(batch)), {data.text_column: batch})
