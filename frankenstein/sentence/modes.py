"""What a sentence encoder is used for: similarity of pairs, and embeddings of a file.

Source: Transformer Encoder Frankenstein, section 7 and algorithm 4.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from frankenstein.artifact import sha256
from frankenstein.errors import FrankensteinError, NotBuiltYetError
from frankenstein.registry import UnknownNameError, nearest
from frankenstein.sentence.encoder import SentenceEncoder
from frankenstein.sentence.export import write_embeddings
from frankenstein.sentence.files import read_texts

MODES = ("similarity", "encode")
ANNOUNCED_MODES = ("search", "cluster")


def check_mode(name: str) -> None:
    """Raise unless this version has the mode: NotBuiltYetError for search and cluster, else UnknownNameError."""
    if name in ANNOUNCED_MODES:
        raise NotBuiltYetError(f"mode {name!r} is not built yet; built: {', '.join(MODES)}")
    if name not in MODES:
        raise UnknownNameError(f"unknown mode {name!r}; known: {', '.join(MODES)}{nearest(name, list(MODES))}")


def similarity(model: SentenceEncoder, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Cosine of each pair of sentences. Returns: (n,) float32."""
    return model.similarity([first for first, _ in pairs], [second for _, second in pairs])


def encode_file(model: SentenceEncoder, path: Path, out: Path, precision: str = "float32") -> int:
    """Embed a txt (one sentence a line), csv, jsonl or parquet file (column `text`) into an embeddings artifact.

    Returns:  the number of sentences.
    Raises:   FrankensteinError: for a file, row or precision that is wrong; nothing is written then.
    """
    num_rows = sum(1 for _ in read_texts(path))  # a first pass, so that a bad row is found before the work
    if num_rows == 0:
        raise FrankensteinError(f"{path}: has no sentences")
    source = {"file_sha256": sha256(path)}
    write_embeddings(model, read_texts(path), num_rows, out=out, precision=precision, source=source)
    return num_rows
