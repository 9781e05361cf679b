"""Embeddings of many texts as files: embeddings.parquet (id, text, embedding), and embeddings.npy in the same order."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from frankenstein.artifact import MANIFEST, new_folder, open_folder, sha256
from frankenstein.errors import FrankensteinError
from frankenstein.runtime import prepare_torch
from frankenstein.sentence.encoder import INT8_SCALE, PRECISIONS, SentenceEncoder
from frankenstein.sentence.options import ExportOptions

log = logging.getLogger(__name__)
Row = tuple[str, str]
_BLOCK = 2048


def export_embeddings(*, sbert: Path, cache: Path, options: ExportOptions, threads: int, out: Path) -> None:
    """Embed the first `options.rows` texts of the cached corpus with one of the fine-tuned models.

    Args:
        sbert: folder with the fine-tuned models, ternary/ and full/.
        cache: corpus_cache artifact.
        out: the embeddings artifact.
    Raises:  FrankensteinError: when the chosen model was not made.
    """
    prepare_torch(threads)
    folder = sbert / options.model
    if not folder.is_dir():
        there = sorted(p.name for p in sbert.iterdir() if p.is_dir()) if sbert.is_dir() else []
        raise FrankensteinError(
            f"{folder}: export.model is {options.model!r}, but there is only: {', '.join(there) or 'nothing'}"
        )
    open_folder(cache, "corpus_cache")
    model = SentenceEncoder.load(folder)
    num_rows = min(options.rows, _corpus_rows(cache))
    source = {
        "model": options.model,
        "model_sha256": sha256(folder / MANIFEST),
        "corpus_sha256": sha256(cache / MANIFEST),
    }
    rows = islice(_corpus(cache), num_rows)
    write_embeddings(
        model, rows, num_rows, out=out, batch_size=options.batch_size, precision=options.precision, source=source
    )
    log.info("embedded %d texts in %d dimensions as %s: %s", num_rows, model.dimension, options.precision, out)


def write_embeddings(
    model: SentenceEncoder,
    rows: Iterator[Row],
    num_rows: int,
    *,
    out: Path,
    batch_size: int = 64,
    precision: str = "float32",
    source: dict[str, Any],
) -> None:
    """Write the embeddings artifact of `num_rows` (id, text) rows; memory does not grow with their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if precision not in PRECISIONS:
        raise FrankensteinError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    value = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[precision]
    kind = pa.list_(value, model.dimension)
    schema = pa.schema([("id", pa.string()), ("text", pa.string()), ("embedding", kind)])
    with new_folder(out, "embeddings", _config(model, num_rows, precision, source)) as folder:
        shape = (num_rows, model.dimension)
        array = _new_npy(folder / "embeddings.npy", np.dtype(precision), shape)
        filled = 0
        with pq.ParquetWriter(folder / "embeddings.parquet", schema, compression="zstd") as writer:
            while block := list(islice(rows, _BLOCK)):
                ids, texts = zip(*block, strict=True)
                vectors = model.encode(texts, batch_size, precision)
                array[filled : filled + len(block)] = vectors
                filled += len(block)
                embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), value), type=kind)
                writer.write_table(pa.table([pa.array(ids), pa.array(texts), embedding], schema=schema))
        assert filled == num_rows, f"{filled} rows came, {num_rows} were announced"
        array.flush()
        del array


def _new_npy(path: Path, dtype: np.dtype[Any], shape: tuple[int, int]) -> np.memmap[Any, Any]:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _config(model: SentenceEncoder, num_rows: int, precision: str, source: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_kind": model.kind,
        "dimension": model.dimension,
        "rows": num_rows,
        "precision": precision,
        "int8_scale": INT8_SCALE if precision == "int8" else None,
        **model.settings.to_config(),
        "source": source,
    }


def _shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("corpus-*.parquet"))


def _corpus_rows(cache: Path) -> int:
    import pyarrow.parquet as pq

    return sum(pq.read_metadata(shard).num_rows for shard in _shards(cache))


def _corpus(cache: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    for shard in _shards(cache):
        with pq.ParquetFile(shard) as file:
            for batch in file.iter_batches(_BLOCK, columns=["id", "text"]):
                yield from zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
