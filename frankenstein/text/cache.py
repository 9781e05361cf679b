"""The corpus cache: what every later stage reads instead of the user's files."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frankenstein.artifact import new_folder, write_json
from frankenstein.errors import FrankensteinError
from frankenstein.text.cleaning import Cleaner
from frankenstein.text.options import DataOptions
from frankenstein.text.overlap import Overlap
from frankenstein.text.pairs import write_pairs
from frankenstein.text.parquet_folder import CorpusWriter
from frankenstein.text.sources.corpus import Reading, read_corpus
from frankenstein.text.sources.hub import HubAccess
from frankenstein.text.sources.rows import Rows
from frankenstein.text.task_files import task_splits

_log = logging.getLogger(__name__)


def cache_parquet(
    data: DataOptions,
    *,
    seed: int,
    out: str | Path,
    max_samples: int = 1_000_000,
    dataset_batch_size: int = 1024,
    stream_local_parquet: bool = True,
    hub: HubAccess | None = None,
) -> dict[str, Any]:
    """Write the cleaned corpus and the checked evaluation pairs as a `corpus_cache` artifact.

    Returns:  the counts that also stand in its config.json: rows, chars, words, documents, split_documents, rejected
        rows by reason, pairs by task and split, and the overlap of the test sets.
    Raises:
        FrankensteinError: for anything wrong in the input, naming file and row; an earlier artifact at `out` stays.
    """
    reading = Reading(max_samples, dataset_batch_size, whole_files=not stream_local_parquet, hub=hub or HubAccess())
    batches = read_corpus(data, reading, seed=seed)
    with new_folder(out, "corpus_cache") as folder:
        overlap = Overlap()
        tasks: dict[str, dict[str, int]] = {}
        for task, split, pairs in task_splits(data, seed=seed, batch_size=dataset_batch_size):
            write_pairs(folder, task, split, pairs)
            overlap.add_split(task, split, pairs.first, pairs.second)
            tasks.setdefault(task, {})[split] = len(pairs)
        cleaner, writer = Cleaner(data), CorpusWriter(folder, data.rows_per_shard)
        words = _write_corpus(batches, cleaner, writer, overlap)
        if not cleaner.rows:
            reasons = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in cleaner.rejected.items())
            raise FrankensteinError(
                f"data.source: {data.source}: no usable text in {cleaner.documents} rows ({reasons})"
            )
        counts = {
            "rows": cleaner.rows,
            "chars": cleaner.chars,
            "words": words,
            "documents": cleaner.documents,
            "split_documents": cleaner.split,
            "rejected": cleaner.rejected,
            "tasks": tasks,
            "overlap": overlap.report(),
        }
        write_json(folder / "config.json", {**counts, "shards": writer.shards})
    _log.info("cached %d rows, %d characters; rejected %s", cleaner.rows, cleaner.chars, cleaner.rejected)
    return counts


def _write_corpus(batches: Iterator[Rows], cleaner: Cleaner, writer: CorpusWriter, overlap: Overlap) -> int:
    """Clean and store all rows; returns the number of words."""
    words = 0
    for rows in batches:
        for id, text, source in cleaner.documents_of(rows):
            words += overlap.look_in(text)
            writer.add(id, text, source)
    writer.close()
    return words
