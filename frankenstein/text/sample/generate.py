"""The sample's public functions: a corpus and labelled pairs, both decided by a seed."""

from collections.abc import Callable, Iterator
from random import Random

from frankenstein.errors import FrankensteinError
from frankenstein.registry import nearest
from frankenstein.text.sample import draw, nli, paraphrase, similarity
from frankenstein.text.sample.corpus import draw_text
from frankenstein.text.sample.splits import SPLITS, Pair, collect

_TASKS: dict[str, Callable[[Random, int], Pair | None]] = {
    "xnli": nli.draw_pair,
    "pawsx": paraphrase.draw_pair,
    "stsb": similarity.draw_pair,
}
MAX_CORPUS = 200_000
MAX_PAIRS = {"train": 60_000, "dev": 8_000, "test": 8_000}


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise FrankensteinError(
            f"the sample has no {name} {value!r}; known: {', '.join(known)}{nearest(value, list(known))}"
        )


def corpus(n: int, seed: int) -> Iterator[str]:
    """`n` distinct texts of one to three Spanish sentences; a smaller n gives the beginning of the same corpus.

    Raises:
        FrankensteinError: n is negative or above MAX_CORPUS.
    """
    if not 0 <= n <= MAX_CORPUS:
        raise FrankensteinError(f"the sample corpus has 0 to {MAX_CORPUS} texts, not {n}")
    return _texts(n, draw.seeded("corpus", seed))


def _texts(n: int, rng: Random) -> Iterator[str]:
    seen: set[str] = set()
    while len(seen) < n:
        text = draw_text(rng)
        if text not in seen:
            seen.add(text)
            yield text


def pairs(task: str, split: str, n: int, seed: int) -> list[tuple[str, str, float | int]]:
    """`n` distinct pairs (sentence1, sentence2, target); no pair is in two splits, whatever the sizes and seeds.

    Args:
        task: xnli (0 entailment, 1 neutral, 2 contradiction), pawsx (1 paraphrase, 0 not) or stsb (score 0..5).
        split: train, dev or test.
        n: labels are balanced to within one pair; at most MAX_PAIRS[split].
        seed: another seed gives other pairs.
    Raises:
        FrankensteinError: unknown task or split, or more pairs than the grammar is sure to give.
    """
    _check("task", task, tuple(_TASKS))
    _check("split", split, SPLITS)
    if not 0 <= n <= MAX_PAIRS[split]:
        raise FrankensteinError(f"the sample has 0 to {MAX_PAIRS[split]} {split} pairs of {task}, not {n}")
    found = collect(_TASKS[task], split, n, draw.seeded(task, split, seed))
    return [(pair.first, pair.second, pair.target) for pair in found]
