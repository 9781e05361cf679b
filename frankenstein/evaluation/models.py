"""The model rows of a results table, and their sentence vectors, each distinct sentence embedded once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.evaluation.outcome import FINE_TUNED
from frankenstein.model.encoder import Encoder
from frankenstein.model.storage import empty_encoder, read_config
from frankenstein.sentence.encoder import SentenceEncoder, SentenceSettings

Encode = Callable[[list[str]], np.ndarray]


def model_rows(sbert: Path, encoder: Path, *, seed: int, batch_size: int) -> Iterator[tuple[str, Encode]]:
    """(row, function from sentences to vectors (n, D)) of every model there is, one in memory at a time.

    Args:
        sbert: folder with the fine-tuned models `ternary/` (packed) and `full/`; one may be absent.
        encoder: the pretrained encoder, scored with mean pooling as it is, and once more with fresh random weights.
    Raises:
        FrankensteinError: when neither fine-tuned model is there.
    """
    present = [name for name in FINE_TUNED if (sbert / name).is_dir()]
    if not present:
        raise FrankensteinError(
            f"{sbert}: found neither {FINE_TUNED[0]}/ nor {FINE_TUNED[1]}/; expected a fine-tuned model"
        )
    length = 0
    for name in present:
        model = SentenceEncoder.load(sbert / name)
        length = model.settings.max_length
        yield name, _encode(model, batch_size)
    pretrained = SentenceEncoder.load(encoder)
    settings = SentenceSettings(max_length=length)
    yield "pretrained", _encode(SentenceEncoder(pretrained.model, pretrained.tokenizer, settings), batch_size)
    yield "random_init", _encode(SentenceEncoder(_random(encoder, seed), pretrained.tokenizer, settings), batch_size)


def _encode(model: SentenceEncoder, batch_size: int) -> Encode:
    return lambda texts: model.encode(texts, batch_size=batch_size)


def _random(encoder: Path, seed: int) -> Encoder:
    """The encoder's architecture, in full precision, with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return empty_encoder(encoder, read_config(encoder))


class Vectors:
    """Sentence vectors of one model, looked up by sentence."""

    def __init__(self, row: str, texts: list[str], encode: Encode) -> None:
        self._place = {text: i for i, text in enumerate(texts)}
        self.matrix = encode(texts)
        broken = int((~np.isfinite(self.matrix).all(axis=1)).sum())
        if broken:
            raise FrankensteinError(
                f"model {row!r}: {broken} of {len(texts)} sentence vectors are not finite; the model is damaged"
            )

    def __call__(self, texts: list[str]) -> np.ndarray:
        """(n, D) float32 of sentences that were embedded."""
        return self.matrix[[self._place[text] for text in texts]]
