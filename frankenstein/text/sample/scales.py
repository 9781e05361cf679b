"""Comparisons of two people, or of two people's things, on one scale (height, price), and their true paraphrases."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from frankenstein.text.sample.grammar import Thing, adjective, noun_name, noun_phrase
from frankenstein.text.sample.lexicon import ADJECTIVES, BY_KIND, NOUNS

# Scales on which "more A" and "less B", and the same turned round, always mean the same.
_GRADED = {
    "person": ("alto", "bajo", "joven", "viejo", "rico", "pobre", "fuerte", "débil"),
    "vehicle": ("rápido", "lento", "caro", "barato", "pesado", "ligero"),
    "furniture": ("caro", "barato", "pesado", "ligero"),
    "instrument": ("caro", "barato", "pesado", "ligero"),
    "device": ("caro", "barato", "pesado", "ligero"),
    "container": ("caro", "barato", "pesado", "ligero"),
    "garment": ("caro", "barato"),
}
Saying = Callable[[str, str], str]


def opposite(scale: str) -> str:
    """The other end of a scale."""
    antonym = ADJECTIVES[scale].antonym
    assert antonym is not None
    return antonym


@dataclass(frozen=True)
class Comparison:
    """Two people compared by an adjective; with an object, their two objects of that kind are compared.

    Things of one kind are compared, so that nothing known about the world (a lorry is heavier than a bicycle) decides.
    """

    one: str
    two: str
    scale: str
    thing: str | None = None

    def key(self) -> str:
        """The lexical combination, the same for a word and its opposite."""
        return ":".join([*sorted((self.one, self.two)), min(self.scale, opposite(self.scale)), self.thing or ""])

    def scales(self) -> tuple[str, ...]:
        """All adjectives by which these can be compared."""
        return _GRADED["person" if self.thing is None else NOUNS[self.thing].kind]

    def sayings(self) -> list[Saying]:
        """The four ways to say that the first is more `scale` than the second; they mean the same."""
        other = opposite(self.scale)
        return [
            lambda one, two: self._clause(self.scale, "más", one, two),
            lambda one, two: self._clause(self.scale, "menos", two, one),
            lambda one, two: self._clause(other, "más", two, one),
            lambda one, two: self._clause(other, "menos", one, two),
        ]

    def _clause(self, scale: str, degree: str, subject: str, other: str) -> str:
        """ "la médica es más alta que el alumno", "el coche de la médica es más caro que el de la alumna"."""
        first, second = noun_phrase(Thing(subject)), noun_phrase(Thing(other))
        gender = noun_name(Thing(subject if self.thing is None else self.thing))[1]
        if self.thing is not None:
            first = f"{noun_phrase(Thing(self.thing))} de {first}"
            second = f"{'el' if gender == 'm' else 'la'} de {second}"
        return f"{first} es {degree} {adjective(scale, 0, gender)} que {second}"


def comparison(rng: Random) -> Comparison:
    """Two people, or their things, and an adjective to compare them by."""
    one, two = rng.sample(BY_KIND["person"], 2)
    kind = rng.choice(("person", "person", *_GRADED))
    thing = None if kind == "person" else rng.choice(BY_KIND[kind])
    return Comparison(one, two, rng.choice(_GRADED[kind]), thing)


def source(rng: Random, found: Comparison) -> str:
    """ "Según la maestra," in half of the draws; what is said according to one source stays comparable."""
    others = [key for key in BY_KIND["person"] if key not in (found.one, found.two)]
    return f"según {noun_phrase(Thing(rng.choice(others)))}," if rng.random() < 0.5 else ""
