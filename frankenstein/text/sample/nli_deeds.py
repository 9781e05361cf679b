"""Inference about deeds that have an opposite: accept or reject, pass or fail, of one person or of a group.

Labels: 0 entailment, 1 neutral, 2 contradiction.
"""

from random import Random

from frankenstein.text.sample import draw
from frankenstein.text.sample import morphology as m
from frankenstein.text.sample.grammar import Thing, coordinate, noun_name, noun_phrase
from frankenstein.text.sample.lexicon import BY_KIND
from frankenstein.text.sample.splits import Pair

# A verb, its opposite (exactly one is true of whoever faces the matter), a verb that leaves both open, matters.
_DEEDS = (
    (
        "aceptar",
        "rechazar",
        "esperar",
        ("la oferta", "la invitación", "la propuesta", "el plan", "la idea", "la ayuda"),
    ),
    ("aprobar", "suspender", "preparar", ("el examen", "la prueba", "el curso", "la asignatura")),
    ("cumplir", "incumplir", "comentar", ("la norma", "el acuerdo", "la orden", "la promesa")),
    (
        "recordar",
        "olvidar",
        "apuntar",
        ("la fecha", "la reunión", "el nombre", "la dirección", "la hora", "la respuesta"),
    ),
)


def _deed(rng: Random) -> tuple[str, str, str, str, str]:
    """(verb, opposite, open verb, matter, time)."""
    verb, other, open_verb, matters = rng.choice(_DEEDS)
    if rng.random() < 0.5:
        verb, other = other, verb
    return verb, other, open_verb, rng.choice(matters), draw.time(rng)


def _tell(subject: str, verb: str, matter: str, when: str, many: bool = False) -> str:
    return m.sentence(subject, m.verb(verb, "past", "3p" if many else "3s"), matter, when)


def individual(shape: Random, rng: Random, label: int) -> Pair:
    """ "El médico aceptó la oferta", or "no rechazó": at issue is one person's deed."""
    verb, other, open_verb, matter, when = _deed(rng)
    person = draw.noun(rng, ("person",))
    friend = draw.noun(rng, ("person",), apart=(person,))
    denied, dated = shape.random() < 0.5, shape.random() < 0.5
    name = noun_phrase(Thing(person))
    hypothesis = m.sentence(name, "no" if denied else "", m.verb(verb, "past"), matter, when if dated else "")
    keys = (":".join((person, matter, min(verb, other))),)
    if label == 1:
        subject, done = rng.choice(
            ((name, open_verb), (noun_phrase(Thing(friend)), verb), (noun_phrase(Thing(friend)), other))
        )
        return Pair(_tell(subject, done, matter, when), hypothesis, label, keys)
    happened = (label == 0) != denied
    # That it was so on one day says it was so; that it was not so on one day says nothing of the others.
    date = when if happened or dated else ""
    return Pair(
        _individual_premise(rng, (name, friend), (verb, other, matter, date), happened), hypothesis, label, keys
    )


def _individual_premise(rng: Random, who: tuple[str, str], deed: tuple[str, str, str, str], happened: bool) -> str:
    """The deed told outright or with a companion; if it did not happen, denied or told as its opposite."""
    name, friend = who
    verb, other, matter, when = deed
    told = verb if happened else other
    kind = rng.random()
    if kind < 0.35:
        both = coordinate(*rng.sample((name, noun_phrase(Thing(friend))), 2))
        return _tell(both, told, matter, when, many=True)
    if kind < 0.6 and not happened:
        return m.sentence(name, "no", m.verb(verb, "past"), matter, when)
    if kind < 0.6:
        return m.sentence(when, name, m.verb(told, "past"), matter)
    return _tell(name, told, matter, when)


def _group(key: str, article: str) -> str:
    """ "todos los alumnos", "algunas alumnas", "ningún alumno"."""
    word, gender = noun_name(Thing(key))
    many = article != "none"
    return f"{m.article(article, word, gender, many)} {m.plural(word) if many else word}"


def _role(key: str) -> int:
    """The same number for a man and a woman of one role: "los maestros" may include "las maestras"."""
    return BY_KIND["person"].index(key) // 2


def group(shape: Random, rng: Random, label: int) -> Pair:
    """ "Algunos alumnos aprobaron el examen" or "ningún alumno aprobó": at issue is whether anybody did."""
    verb, other, _, matter, when = _deed(rng)
    people = draw.noun(rng, ("person",))
    strangers = rng.choice([key for key in BY_KIND["person"] if _role(key) != _role(people)])
    denied, few = shape.random() < 0.5, shape.choice(("some", "several"))
    article = "none" if denied else few
    hypothesis = _tell(_group(people, article), verb, matter, "", many=not denied)
    keys = (":".join((people, matter, min(verb, other))),)
    if label == 1:
        foreign = rng.choice(("all", "none", "several"))
        premise = _tell(_group(strangers, foreign), rng.choice((verb, other)), matter, when, many=foreign != "none")
    elif (label == 0) != denied:
        premise = _tell(_group(people, rng.choice(("all", "all", "several"))), verb, matter, when, many=True)
    elif rng.random() < 0.6:
        premise = _tell(_group(people, "all"), other, matter, "", many=True)
    else:
        premise = _tell(_group(people, "none"), verb, matter, "")
    return Pair(premise, hypothesis, label, keys)
