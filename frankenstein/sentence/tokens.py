"""Sentences as token rows: [CLS] pieces [SEP], cut to a length, kept flat in memory, padded a batch at a time."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from frankenstein.errors import FrankensteinError
from frankenstein.text.tokenizer import Tokenizer


def check_sentences(texts: Sequence[str]) -> None:
    """Raise FrankensteinError unless `texts` is a sequence of strings; a lone string is no sequence of sentences."""
    if isinstance(texts, str):
        raise FrankensteinError(f"expected a list of sentences, found one string {texts[:40]!r}; put it in a list")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise FrankensteinError(
                f"sentence {index}: expected a string, found {type(text).__name__} {str(text)[:40]!r}"
            )


class SentenceRows:
    """Tokenized sentences in one flat array; row i is `flat[starts[i]:starts[i + 1]]`.

    Args:
        texts: sentences.
        max_length: most tokens of a row, [CLS] and [SEP] included; the sentence's end is cut.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> None:
        self.pad_id = tokenizer.pad_id
        pieces = tokenizer.encode_batch(list(texts))
        rows = [[tokenizer.cls_id, *ids[: max_length - 2], tokenizer.sep_id] for ids in pieces]
        self.lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])
        self.flat = np.fromiter((i for row in rows for i in row), dtype=np.int32, count=int(self.starts[-1]))

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> np.ndarray:
        """Token ids of one sentence."""
        return self.flat[self.starts[index] : self.starts[index + 1]]


def pad_rows(rows: Iterable[np.ndarray], pad_id: int) -> tuple[Tensor, Tensor]:
    """One right-padded batch, on the CPU.

    Returns:  ids (B, T) int64, mask (B, T) bool with True = real; T is the longest row's length.
    """
    rows = list(rows)
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max())[None] < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask)
