"""Which lexical combinations belong to which split, and collecting distinct pairs of one split."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from zlib import crc32

from frankenstein.errors import FrankensteinError

SPLITS = ("train", "dev", "test")
_STALL = 20_000


@dataclass(frozen=True)
class Pair:
    """Two sentences, their label or score, and the lexical combination of each."""

    first: str
    second: str
    target: float | int
    keys: tuple[str, ...]

    def identity(self) -> tuple[str, ...]:
        """The two sentences without regard to order and capitals."""
        return tuple(sorted((self.first.casefold(), self.second.casefold())))


def split_of(keys: tuple[str, ...]) -> str:
    """The split of a pair: test where any of its combinations is held out for test, else dev likewise, else train.

    The rule does not depend on the order of the pair or on the seed, so that no pair can be in two splits, and
    training never shows a combination that was held out. A tenth of the combinations is held out for each.
    """
    shares = [crc32(key.encode()) % 10 for key in keys]
    return "test" if 0 in shares else "dev" if 1 in shares else "train"


def collect(draw: Callable[[Random, int], Pair | None], split: str, count: int, rng: Random) -> list[Pair]:
    """`count` distinct pairs of one split; draw(rng, i) proposes the pair with index i, or None where it finds none.

    Raises:
        FrankensteinError: the grammar gives no new pair any more.
    """
    seen: set[tuple[str, ...]] = set()
    found: list[Pair] = []
    failures = 0
    while len(found) < count:
        pair = draw(rng, len(found))
        if pair is None or pair.identity() in seen or pair.first == pair.second or split_of(pair.keys) != split:
            failures += 1
            if failures > _STALL:
                raise FrankensteinError(
                    f"the sample grammar gives {len(found)} {split} pairs, not {count}; ask for fewer"
                )
            continue
        failures = 0
        seen.add(pair.identity())
        found.append(pair)
    rng.shuffle(found)
    return found
