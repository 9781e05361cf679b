"""Inference about states: attributes, comparisons, numbers, whereabouts, order in time.

Labels: 0 entailment, 1 neutral, 2 contradiction.
"""

from dataclasses import dataclass, replace
from math import inf
from random import Random

from frankenstein.text.sample import draw, scales
from frankenstein.text.sample import morphology as m
from frankenstein.text.sample.grammar import Thing, adjective, coordinate, noun_name, noun_phrase, place_phrase
from frankenstein.text.sample.lexicon import ADJECTIVES, APART, BY_KIND, NOUNS, OPPOSITES
from frankenstein.text.sample.splits import Pair

_PETS = ("perro", "gato", "caballo", "vaca", "oveja", "burro", "conejo", "cabra", "pato")
_OWNED = ("vehicle", "furniture", "instrument", "garment", "device", "container", "toy", "jewel")
_HOURS = tuple(m.NUMBERS[hour] for hour in range(2, 12))


def _is(key: str, gender: str, degree: str = "", synonym: int = 0) -> str:
    """ "es muy alto", "está sucia"."""
    copula = "es" if ADJECTIVES[key].copula == "ser" else "está"
    return " ".join(word for word in (copula, degree, adjective(key, synonym, gender)) if word)


def _neither(first: str, second: str, gender: str) -> str:
    """ "no es ni alto ni fuerte", "no es caro ni está sucio"."""
    if ADJECTIVES[first].copula == ADJECTIVES[second].copula:
        return f"no {_is(first, gender, 'ni')} ni {adjective(second, 0, gender)}"
    return f"no {_is(first, gender)} ni {_is(second, gender)}"


def _together(first: str, second: str, gender: str) -> str:
    """ "es alto y fuerte", "es caro y está sucio"."""
    if ADJECTIVES[first].copula == ADJECTIVES[second].copula:
        return coordinate(_is(first, gender), adjective(second, 0, gender))
    return coordinate(_is(first, gender), _is(second, gender))


def attribute(shape: Random, rng: Random, label: int) -> Pair:
    """ "El coche del médico es caro", or that it is not."""
    kind = rng.choice((*_OWNED, "animal", "person", "person"))
    key = rng.choice(_PETS) if kind == "animal" else draw.noun(rng, (kind,))
    quality = rng.choice(OPPOSITES[kind])
    aside = rng.choice([a for a in OPPOSITES[kind] if ADJECTIVES[a].aspect != ADJECTIVES[quality].aspect])
    gender = NOUNS[key].names[0][1]
    subject, foreign = _subjects(rng, key)
    denied = shape.random() < 0.5
    hypothesis = m.sentence(subject, f"no {_is(quality, gender)}" if denied else _is(quality, gender))
    keys = (f"{key}:{min(quality, scales.opposite(quality))}",)
    if label == 1:
        said = rng.choice((_is(quality, gender), _is(scales.opposite(quality), gender, "muy")))
        premise = m.sentence(foreign, said) if rng.random() < 0.4 else m.sentence(subject, _open(rng, aside, gender))
    else:
        premise = m.sentence(subject, _settled(rng, (quality, aside), gender, holds=(label == 0) != denied))
    return Pair(premise, hypothesis, label, keys)


def _subjects(rng: Random, key: str) -> tuple[str, str]:
    """ "el coche del médico" and "el coche de la alumna"; a person belongs to nobody: "el médico", "el alumno"."""
    if NOUNS[key].kind == "person":
        gender = NOUNS[key].names[0][1]
        other = rng.choice([p for p in BY_KIND["person"] if p != key and NOUNS[p].names[0][1] == gender])
        return noun_phrase(Thing(key)), noun_phrase(Thing(other))
    one, two = (
        f"{noun_phrase(Thing(key))} de {noun_phrase(Thing(owner))}" for owner in rng.sample(BY_KIND["person"], 2)
    )
    return one, two


def _open(rng: Random, aside: str, gender: str) -> str:
    """A statement about another quality."""
    return rng.choice(
        (_is(aside, gender), _is(aside, gender, "muy"), f"no {_is(aside, gender)}", f"no {_is(aside, gender)}")
    )


def _settled(rng: Random, qualities: tuple[str, str], gender: str, holds: bool) -> str:
    """A statement from which the first quality follows, or its absence."""
    quality, aside = qualities
    if holds:
        ways = (
            _is(quality, gender, "muy"),
            _together(quality, aside, gender),
            _together(aside, quality, gender),
            _is(quality, gender, synonym=1),
        )
        return rng.choice(ways)
    against = scales.opposite(quality)
    return rng.choice(
        (
            _is(against, gender, "muy"),
            _together(aside, against, gender),
            f"no {_is(quality, gender)}",
            _neither(aside, quality, gender),
        )
    )


def comparison(shape: Random, rng: Random, label: int) -> Pair:
    """ "El médico es más alto que el cartero"."""
    found = scales.comparison(rng)
    one, two, scale = found.one, found.two, found.scale
    third = draw.noun(rng, ("person",), apart=(one, two))
    form = shape.randrange(4)
    hypothesis = m.sentence(found.sayings()[form](one, two))
    said = rng.choice([saying for index, saying in enumerate(found.sayings()) if index != form])
    keys = (found.key(),)
    if label == 1:
        aspect = ADJECTIVES[scale].aspect
        others = [a for a in found.scales() if ADJECTIVES[a].aspect != aspect]
        if others and rng.random() < 0.6:
            aside = replace(found, scale=rng.choice(others))
            return Pair(m.sentence(rng.choice(aside.sayings())(*rng.sample((one, two), 2))), hypothesis, label, keys)
        pair = rng.choice(((one, third), (third, one), (two, third), (third, two)))
        return Pair(m.sentence(said(*pair)), hypothesis, label, keys)
    high, low = (one, two) if label == 0 else (two, one)
    chain = rng.random() < 0.3
    premise = coordinate(said(high, third), said(third, low)) if chain else said(high, low)
    return Pair(m.sentence(premise), hypothesis, label, keys)


@dataclass(frozen=True)
class Amount:
    """A numeral phrase and the numbers for which it is true, from low to high."""

    words: str
    low: float
    high: float


def _amount(rng: Random, kind: str, gender: str) -> Amount:
    value = rng.randrange(3, 11)
    word = m.number(value, gender, digits=rng.random() < 0.3)
    low, high = {
        "exactamente": (value, value),
        "solo": (value, value),
        "más de": (value + 1, inf),
        "al menos": (value, inf),
        "menos de": (0, value - 1),
        "como máximo": (0, value),
    }[kind]
    return Amount(f"{kind} {word}", low, high)


_AMOUNTS = ("exactamente", "solo", "más de", "al menos", "menos de", "como máximo")


def relation(premise: Amount, hypothesis: Amount) -> int:
    """The label that follows from the two ranges of numbers."""
    if premise.low >= hypothesis.low and premise.high <= hypothesis.high:
        return 0
    return 2 if premise.high < hypothesis.low or premise.low > hypothesis.high else 1


def count(shape: Random, rng: Random, label: int) -> Pair:
    """ "En la plaza hay más de tres coches"."""
    key = draw.noun(rng, ("person", "animal", "vehicle", "furniture", "flower", "container"))
    word, gender = noun_name(Thing(key))
    where = draw.place(rng)
    asked = _amount(rng, shape.choice(_AMOUNTS), gender)
    elsewhere = label == 1 and rng.random() < 0.3
    told = _amount(rng, rng.choice(_AMOUNTS), gender)
    while told.words == asked.words or (not elsewhere and relation(told, asked) != label):
        told = _amount(rng, rng.choice(_AMOUNTS), gender)
    there = place_phrase(draw.place(rng, where) if elsewhere else where)
    hypothesis = m.sentence(place_phrase(where), "hay", asked.words, m.plural(word))
    premise = rng.choice((("hay", told.words, m.plural(word), there), (there, "hay", told.words, m.plural(word))))
    return Pair(m.sentence(*premise), hypothesis, label, (f"{key}:{where}",))


def whereabouts(shape: Random, rng: Random, label: int) -> Pair:
    """ "A las ocho el médico estaba en el museo", or that he was not."""
    person = draw.noun(rng, ("person",))
    friend = draw.noun(rng, ("person",), apart=(person,))
    here, there = rng.sample(APART, 2)
    hour, later = rng.sample(_HOURS, 2)
    denied = shape.random() < 0.5
    name = noun_phrase(Thing(person))
    hypothesis = m.sentence(f"a las {hour}", name, "no" if denied else "", "estaba", place_phrase(here))
    keys = (f"{person}:{here}",)
    if label == 1:
        who, when = (name, later) if rng.random() < 0.5 else (noun_phrase(Thing(friend)), hour)
        premise = m.sentence(f"a las {when}", who, "estaba", place_phrase(rng.choice((here, there))))
        return Pair(premise, hypothesis, label, keys)
    present = (label == 0) != denied
    place = place_phrase(here if present else there, rng.randrange(2))
    company = noun_phrase(Thing(friend))
    told = rng.choice(
        (
            (f"a las {hour}", coordinate(*rng.sample((name, company), 2)), "estaban", place),
            (name, "estaba", place, f"a las {hour}"),
            (f"a las {hour}", company, "vio a", name, place),
        )
    )
    return Pair(m.sentence(*told), hypothesis, label, keys)


_MOVES = ("llegar", "salir", "terminar", "entrar", "despertarse")


def _moved(verb: str, many: bool = False) -> str:
    if verb.endswith("se"):
        return f"se {m.verb(verb[:-2], 'past', '3p' if many else '3s')}"
    return m.verb(verb, "past", "3p" if many else "3s")


def order(shape: Random, rng: Random, label: int) -> Pair:
    """ "El médico llegó antes que el cartero"."""
    one, two = rng.sample(BY_KIND["person"], 2)
    third = draw.noun(rng, ("person",), apart=(one, two))
    verb, aside = rng.sample(_MOVES, 2)
    word, converse = ("antes", "después") if shape.random() < 0.5 else ("después", "antes")
    name = {key: noun_phrase(Thing(key)) for key in (one, two, third)}
    hypothesis = m.sentence(name[one], _moved(verb), word, "que", name[two])
    keys = (":".join([verb, *sorted((one, two))]),)
    if label == 1:
        a, b = rng.choice(((one, third), (third, one), (two, third), (third, two)))
        a, b, moved = (a, b, verb) if rng.random() < 0.5 else (*rng.sample((one, two), 2), aside)
        premise = m.sentence(name[a], _moved(moved), rng.choice((word, converse)), "que", name[b])
        return Pair(premise, hypothesis, label, keys)
    first, second = (one, two) if (label == 0) == (word == "antes") else (two, one)
    early, late = sorted(rng.sample(range(2, 8), 2))
    clocks = [f"{name[who]} {_moved(verb)} a las {m.NUMBERS[hour]}" for who, hour in ((first, early), (second, late))]
    ways = [
        f"ayer por la tarde {coordinate(*clocks)}",
        f"ayer por la tarde {coordinate(*clocks[::-1])}",
        f"{name[first]} {_moved(verb)} antes que {name[second]}",
        f"{name[second]} {_moved(verb)} después que {name[first]}",
    ]
    together = f"{coordinate(name[one], name[two])} {_moved(verb, many=True)} a la vez"
    premise = m.sentence(together if label == 2 and rng.random() < 0.2 else rng.choice(ways))
    return Pair(premise, hypothesis, label, keys)
