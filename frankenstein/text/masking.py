"""Masked language modelling: which tokens are predicted, and what stands in their place.

Source: Devlin et al. 2019, section 3.1, https://arxiv.org/abs/1810.04805; whole words: https://github.com/google-research/bert.
"""

from dataclasses import dataclass

import numpy as np

_PURPOSE = 1  # keeps these draws apart from those of the example order with the same seed


@dataclass(frozen=True)
class MaskingRule:
    """What may be masked and how much.

    Fields:
        mask_id: id of [MASK]. special_ids: ids that are never chosen and never put in.
        probability: share of the other tokens (whole words: of the words) that is chosen, 0-1.
        word_starts: (vocab_size,) bool, pieces that begin a word: whole words are chosen; None chooses single tokens.
    """

    mask_id: int
    special_ids: tuple[int, ...]
    vocab_size: int
    probability: float
    word_starts: np.ndarray | None = None


def mask_rows(rows: np.ndarray, rule: MaskingRule, *, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose tokens and hide them: 80 % become [MASK], 10 % a random ordinary token, 10 % stay.

    A pure function of its arguments. A row with any ordinary token has at least one chosen token (whole words: word).
    Args:
        rows: (B, T) int64.
    Returns:  inputs (B, T) int64 and chosen (B, T) bool; the labels are rows[chosen].
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, _PURPOSE]))
    ordinary = np.ones(rule.vocab_size, bool)
    ordinary[list(rule.special_ids)] = False
    candidates = ordinary[rows]
    draws = rng.random(rows.shape, np.float32)
    if rule.word_starts is not None:
        draws = _one_draw_a_word(draws, candidates, rule.word_starts[rows])
    draws = np.where(candidates, draws, np.float32(2))  # 2: never below a probability
    lowest = draws.min(axis=1, keepdims=True, initial=2)
    chosen = candidates & ((draws < rule.probability) | (draws == lowest))
    fate = rng.random(rows.shape, np.float32)
    replacements = np.flatnonzero(ordinary)
    inputs = rows.copy()
    inputs[chosen & (fate < 0.8)] = rule.mask_id
    swapped = chosen & (fate >= 0.8) & (fate < 0.9)
    inputs[swapped] = replacements[rng.integers(0, len(replacements), int(swapped.sum()))]
    return inputs, chosen


def _one_draw_a_word(draws: np.ndarray, candidates: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Give every token the draw of its word's first token; words also begin after special tokens and with a row."""
    previous = np.zeros_like(candidates)
    previous[:, 1:] = candidates[:, :-1]
    first = (starts | ~previous | ~candidates).ravel()
    word = np.cumsum(first) - 1
    return draws.ravel()[first][word].reshape(draws.shape)
