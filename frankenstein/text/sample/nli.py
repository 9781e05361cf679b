"""Inference: premise and hypothesis whose label is true by construction.

The hypothesis is drawn first, without regard to the label, and the premise is then made so that it entails the
hypothesis, contradicts it, or leaves it open. So the hypothesis alone tells nothing. Three pairs in a row, one of each
label, share the shape of the hypothesis (its family, polarity and details), not its words.
"""

from collections.abc import Callable
from random import Random

from frankenstein.text.sample import draw, nli_deeds, nli_events, nli_facts
from frankenstein.text.sample.splits import Pair

ENTAILMENT, NEUTRAL, CONTRADICTION = 0, 1, 2
Family = Callable[[Random, Random, int], Pair]
_FAMILIES: tuple[Family, ...] = (
    nli_events.positive,
    nli_facts.attribute,
    nli_events.negative,
    nli_deeds.individual,
    nli_facts.comparison,
    nli_events.positive,
    nli_facts.count,
    nli_events.negative,
    nli_facts.whereabouts,
    nli_deeds.group,
    nli_facts.order,
)


def draw_pair(rng: Random, index: int) -> Pair:
    """A pair whose label is index mod 3."""
    shape = draw.seeded("shape", index // 3)
    family = _FAMILIES[index // 3 % len(_FAMILIES)]
    return family(shape, rng, index % 3)
