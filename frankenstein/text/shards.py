"""Packed token rows: the corpus as fixed-length rows of integers in flat files that any row can be read from."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from frankenstein.artifact import new_folder, open_folder, write_json
from frankenstein.errors import FrankensteinError
from frankenstein.text.parquet_folder import read_group, row_groups
from frankenstein.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
SPLITS = ("train", "valid")
_HASHES = 2**64


@dataclass
class _Counts:
    """What was encoded, over all documents: characters, and tokens without [CLS], [SEP] and padding."""

    documents: int = 0
    chars: int = 0
    tokens: int = 0
    unknown: int = 0
    bytes: int = 0

    def add(self, other: "_Counts") -> None:
        self.documents += other.documents
        self.chars += other.chars
        self.tokens += other.tokens
        self.unknown += other.unknown
        self.bytes += other.bytes


class RowWriter:
    """Packs documents into rows `[CLS] document [SEP] document [SEP] ...` of max_length tokens, one file a shard.

    A document that does not fit goes on in the next row, after its [CLS]; only the last row of a split is padded.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, max_length: int, tokens_per_shard: int) -> None:
        self._folder, self._split, self._tokenizer, self._max_length = folder, split, tokenizer, max_length
        self._rows_per_shard = max(1, tokens_per_shard // max_length)
        self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        self._rest = np.empty(0, self._dtype)
        self.shards: list[dict[str, Any]] = []
        self.rows = self.padding = 0

    def add(self, stream: np.ndarray) -> None:
        """Append documents that are already joined by [SEP]: (n,) ids."""
        stream = np.concatenate([self._rest, stream.astype(self._dtype)])
        body = self._max_length - 1
        whole = len(stream) // body
        self._write(stream[: whole * body].reshape(whole, body))
        self._rest = stream[whole * body :]

    def close(self) -> None:
        """Write the last row, padded."""
        if len(self._rest):
            self.padding = self._max_length - 1 - len(self._rest)
            self._write(np.pad(self._rest, (0, self.padding), constant_values=self._tokenizer.pad_id)[None])
            self._rest = self._rest[:0]

    def _write(self, bodies: np.ndarray) -> None:
        rows = np.insert(bodies, 0, self._tokenizer.cls_id, axis=1)
        while len(rows):
            if not self.shards or self.shards[-1]["rows"] == self._rows_per_shard:
                self.shards.append({"file": f"{self._split}-{len(self.shards):05d}.bin", "rows": 0})
            shard = self.shards[-1]
            now = rows[: self._rows_per_shard - shard["rows"]]
            with (self._folder / shard["file"]).open("ab") as stream:
                stream.write(now.tobytes())
            shard["rows"] += len(now)
            self.rows += len(now)
            rows = rows[len(now) :]


def tokenize_corpus(
    cache: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    seed: int,
    out: str | Path,
    validation_fraction: float = 0.0,
    tokens_per_shard: int = 16_777_216,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Encode and pack a `corpus_cache` artifact into a `tokens` artifact.

    A document belongs to the validation split when the hash of (seed, its id) falls below validation_fraction; the
    pieces of one split document stay together. Where the fraction is not 0 and no document (or every one) falls below
    it, the one with the smallest (largest) hash is moved, so that both splits have rows. The bytes do not depend on
    num_workers.
    Returns:  rows by split, tokens, chars_per_token, unk_rate, byte_rate, packing_efficiency.
    Raises:
        FrankensteinError: when validation_fraction is not 0 and there is only one document.
    """
    cached = open_folder(cache, "corpus_cache")
    groups = row_groups(Path(cache), cached["shards"])
    threshold = _validation_threshold(groups, seed, validation_fraction)
    counts = _Counts()
    with new_folder(out, "tokens") as folder:
        writers = {split: RowWriter(folder, split, tokenizer, max_length, tokens_per_shard) for split in SPLITS}
        for streams, counted in _encoded(groups, tokenizer, seed, threshold, num_workers):
            counts.add(counted)
            for split, stream in zip(SPLITS, streams, strict=True):
                writers[split].add(stream)
        for writer in writers.values():
            writer.close()
        report = _report(counts, writers, max_length)
        config = {
            **report,
            "max_length": max_length,
            "vocab_size": tokenizer.vocab_size,
            "pad_id": tokenizer.pad_id,
            "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
            "splits": {split: {"rows": w.rows, "shards": w.shards} for split, w in writers.items()},
        }
        write_json(folder / "config.json", config)
    _log.info("packed %d tokens of %d documents into rows %s", counts.tokens, counts.documents, report["rows"])
    return report


def _report(counts: _Counts, writers: dict[str, RowWriter], max_length: int) -> dict[str, Any]:
    places = sum(w.rows for w in writers.values()) * max_length
    padding = sum(w.padding for w in writers.values())
    return {
        "rows": {split: w.rows for split, w in writers.items()},
        "tokens": counts.tokens,
        "chars_per_token": round(counts.chars / max(counts.tokens, 1), 6),
        "unk_rate": round(counts.unknown / max(counts.tokens, 1), 6),
        "byte_rate": round(counts.bytes / max(counts.tokens, 1), 6),
        "packing_efficiency": round(1 - padding / max(places, 1), 6),
    }


def _validation_threshold(groups: list[tuple[Path, int]], seed: int, fraction: float) -> int:
    """Documents whose hash is below this are held out."""
    if fraction == 0:
        return 0
    lowest, highest = _HASHES, -1
    for file, group in groups:
        hashes = [_hash(id, seed) for id in read_group(file, group, ["id"])[0]]
        lowest, highest = min(lowest, *hashes), max(highest, *hashes)
    if lowest == highest:
        raise FrankensteinError(
            f"data.validation_fraction: found {fraction:g}; expected 0, because the corpus has one document only"
        )
    return max(lowest + 1, min(highest, int(fraction * _HASHES)))


def _hash(id: str, seed: int) -> int:
    document, mark, part = id.rpartition("#")
    base = document if mark and part.isdecimal() else id
    digest = hashlib.blake2b(base.encode("utf-8"), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")


_Encoded = tuple[tuple[np.ndarray, np.ndarray], _Counts]


def _encoded(
    groups: list[tuple[Path, int]], tokenizer: Tokenizer, seed: int, threshold: int, num_workers: int
) -> Iterator[_Encoded]:
    """Every row group's ids, in order, from this process or from `num_workers` others."""
    if num_workers == 0:
        yield from (_encode_group(tokenizer, file, group, seed, threshold) for file, group in groups)
        return
    tasks = [(tokenizer.model_bytes, file, group, seed, threshold) for file, group in groups]
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(_work, tasks)
        except BrokenProcessPool:
            raise FrankensteinError(
                f"training.num_workers: found {num_workers}; a process was killed (out of memory?); try fewer"
            ) from None


_loaded = cache(Tokenizer)


def _work(task: tuple[bytes, Path, int, int, int]) -> _Encoded:
    model, file, group, seed, threshold = task
    return _encode_group(_loaded(model), file, group, seed, threshold)


def _encode_group(tokenizer: Tokenizer, file: Path, group: int, seed: int, threshold: int) -> _Encoded:
    """(training ids, validation ids) of one row group, each document followed by [SEP]; and the counts."""
    ids, texts = read_group(file, group, ["id", "text"])
    streams: tuple[list[int], list[int]] = ([], [])
    for id, tokens in zip(ids, tokenizer.encode_batch(texts), strict=True):
        held_out = threshold > 0 and _hash(id, seed) < threshold
        streams[held_out].extend(tokens)
        streams[held_out].append(tokenizer.sep_id)
    arrays = (np.array(streams[0], np.uint32), np.array(streams[1], np.uint32))
    both = np.concatenate(arrays)
    return arrays, _Counts(
        documents=len(ids),
        chars=sum(map(len, texts)),
        tokens=len(both) - len(ids),
        unknown=int((both == tokenizer.unk_id).sum()),
        bytes=int(tokenizer.byte_ids[both].sum()),
    )


class TokenRows:
    """Packed rows of one split, read from disk as they are asked for.

    Fields:
        num_rows, max_length, vocab_size: int.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], *, max_length: int, vocab_size: int, dtype: str) -> None:
        self.max_length, self.vocab_size = max_length, vocab_size
        kind = np.dtype(dtype).newbyteorder("<")
        self._shards = [np.memmap(file, kind, "r", shape=(rows, max_length)) for file, rows in files]
        self._ends = np.cumsum([rows for _, rows in files], dtype=np.int64)
        self.num_rows = int(self._ends[-1]) if files else 0

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "TokenRows":
        """The rows of split "train" or "valid" of a `tokens` artifact; "valid" may have no rows."""
        config = open_folder(folder, "tokens")
        files = [(Path(folder) / shard["file"], shard["rows"]) for shard in config["splits"][split]["shards"]]
        return cls(files, max_length=config["max_length"], vocab_size=config["vocab_size"], dtype=config["dtype"])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """(n, max_length) int64 rows at (n,) indices in 0..num_rows-1."""
        wanted = np.asarray(indices, np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.num_rows):
            raise IndexError(f"row indices {wanted.min()}..{wanted.max()}; there are {self.num_rows} rows")
        rows = np.empty((len(wanted), self.max_length), np.int64)
        shard_of = np.searchsorted(self._ends, wanted, side="right")
        for k in np.unique(shard_of):
            here = shard_of == k
            first = self._ends[k] - len(self._shards[k])
            rows[here] = self._shards[k][wanted[here] - first]
        return rows
