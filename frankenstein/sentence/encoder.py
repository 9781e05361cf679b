"""The sentence encoder: texts in, vectors out, from a packed ternary or a full-precision artifact."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frankenstein.artifact import open_folder
from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.storage import load_encoder
from frankenstein.quantization.artifact import load_latent, load_packed
from frankenstein.registry import nearest
from frankenstein.sentence.pooling import sentence_vectors
from frankenstein.sentence.tokens import SentenceRows, check_sentences, pad_rows
from frankenstein.text.tokenizer import Tokenizer

PRECISIONS = ("float32", "float16", "int8")
INT8_SCALE = 127
# Batches that are tokenized and sorted by length together; bounds the memory of a stream.
_WINDOW = 32


@dataclass(frozen=True)
class SentenceSettings:
    """How an encoder makes sentence vectors; `max_length` is in tokens, [CLS] and [SEP] included."""

    pooling: str = "mean"
    normalize: bool = True
    max_length: int = 64

    @classmethod
    def of(cls, config: dict[str, Any]) -> "SentenceSettings":
        """The settings in an artifact's config; without any, the mean of all its tokens, normalized."""
        return cls(**config["sentence"]) if config["sentence"] else cls(max_length=config["max_length"])

    def to_config(self) -> dict[str, Any]:
        """As stored under "sentence" in an encoder's config.json."""
        return asdict(self)


def to_precision(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Vectors (n, D) float32 in another number type.

    int8 keeps round(127 x) of unit vectors, so that x is about code / 127 and the dot product of two vectors is
    that of their codes (summed in int32) / 127^2.
    """
    if precision == "int8":
        return np.rint(vectors * INT8_SCALE).astype(np.int8)
    return vectors.astype(precision)


class SentenceEncoder:
    """Sentences to vectors.

    Attributes:
        model: the encoder, (B, T) ids and mask to (B, T, D).
        settings: pooling, normalization and length.
    """

    def __init__(self, model: Encoder, tokenizer: Tokenizer, settings: SentenceSettings, kind: str = "encoder") -> None:
        self.model, self.tokenizer, self.settings, self.kind = model.eval(), tokenizer, settings, kind

    @classmethod
    def load(cls, folder: str | Path, backend: str = "auto", device: str = "cpu") -> "SentenceEncoder":
        """Load an encoder or packed_encoder artifact.

        Args:
            backend: integer arithmetic of a packed encoder; a full-precision one takes no backend but "auto".
        Raises:
            ArtifactError: when the folder is missing, damaged or another kind of artifact.
        """
        config = open_folder(folder, "encoder", "packed_encoder")
        if config["kind"] == "packed_encoder":
            model = load_packed(folder, backend=backend)
        elif backend != "auto":
            raise FrankensteinError(
                f"{folder}: is a full-precision encoder; backend {backend!r} is for packed ternary encoders"
            )
        else:
            model = load_latent(folder) if config["bitnet"] else load_encoder(folder)
        return cls(model.to(device), Tokenizer.load(folder), SentenceSettings.of(config), config["kind"])

    @property
    def dimension(self) -> int:
        """Length D of a sentence vector."""
        return self.model.options.hidden_size

    def encode(self, texts: Sequence[str], batch_size: int = 64, precision: str = "float32") -> np.ndarray:
        """Vectors of the texts, in their order.

        Args:
            texts: sentences; an end beyond `settings.max_length` tokens is cut.
            precision: "float32", "float16" or "int8" (see `to_precision`).
        Returns:  (n, D); (0, D) for no texts.
        Raises:   FrankensteinError: for input that is not a list of strings, or an unknown precision.
        """
        check_sentences(texts)
        vectors = np.empty((len(texts), self.dimension), dtype=precision if precision in PRECISIONS else "float32")
        filled = 0
        for block in self.encode_stream(texts, batch_size, precision):
            vectors[filled : filled + len(block)] = block
            filled += len(block)
        return vectors

    def encode_stream(
        self, texts: Iterable[str], batch_size: int = 64, precision: str = "float32"
    ) -> Iterator[np.ndarray]:
        """Blocks of vectors in the order of the texts, reading only some batches ahead. Arguments as in `encode`."""
        self._check(batch_size, precision)
        stream = iter(texts)
        while block := list(islice(stream, batch_size * _WINDOW)):
            check_sentences(block)
            yield to_precision(self._block(block, batch_size), precision)

    def similarity(self, first: Sequence[str] | np.ndarray, second: Sequence[str] | np.ndarray) -> np.ndarray:
        """Cosine of each pair first[i], second[i]; sentences, or vectors (n, D). Returns: (n,) float32."""
        if len(first) != len(second):
            raise FrankensteinError(
                f"similarity compares pair by pair; found {len(first)} first and {len(second)} second items"
            )
        a, b = (_unit(x if isinstance(x, np.ndarray) else self.encode(x)) for x in (first, second))
        return np.einsum("nd,nd->n", a, b)

    def _check(self, batch_size: int, precision: str) -> None:
        if precision not in PRECISIONS:
            raise FrankensteinError(
                f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}{nearest(precision, list(PRECISIONS))}"
            )
        if precision == "int8" and not self.settings.normalize:
            raise FrankensteinError("precision int8 needs unit vectors, and this model was made with normalize: false")
        if batch_size < 1:
            raise FrankensteinError(f"batch_size is {batch_size}; expected at least 1")

    @torch.inference_mode()
    def _block(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Vectors of texts that are held in memory, computed in batches of like length, longest first."""
        rows = SentenceRows(texts, self.tokenizer, self.settings.max_length)
        order = np.argsort(-rows.lengths, kind="stable")
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        device = next(iter(self.model.state_dict().values())).device
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = (x.to(device) for x in pad_rows((rows.row(i) for i in chosen), rows.pad_id))
            pooled = sentence_vectors(self.model(ids, mask), mask, self.settings.pooling, self.settings.normalize)
            vectors[chosen] = pooled.cpu().numpy()
        return vectors


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
