"""Paraphrase or not, with nearly the same words in both cases (the idea of PAWS, Zhang et al. 2019, https://arxiv.org/abs/1904.01130).

Each pattern draws a meaning and two different ways of saying it; a negative pair says the second way a meaning in which
two parts have changed places. So the words, the voice and the order of both sentences tell nothing about the label.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from frankenstein.text.sample import draw, scales
from frankenstein.text.sample import morphology as m
from frankenstein.text.sample.grammar import (
    ACTIVE_FORMS,
    PASSIVE_FORMS,
    Event,
    Form,
    Thing,
    Wording,
    clause,
    coordinate,
    finite,
    infinitive,
    noun_phrase,
    object_phrase,
    place_phrase,
    say,
    time_phrase,
)
from frankenstein.text.sample.lexicon import BY_KIND, MODIFIERS, NOUNS
from frankenstein.text.sample.splits import Pair

_FORMS: tuple[Form, ...] = (*ACTIVE_FORMS, *PASSIVE_FORMS, "object_first", "cleft")
_CITIES = ("Madrid", "Sevilla", "Toledo", "Granada", "Lima", "Bogotá", "Valencia", "Quito", "Cádiz", "Burgos")
_GIFTS = tuple(key for kind in ("reading", "jewel", "toy", "device", "tool", "instrument") for key in BY_KIND[kind])
Pattern = Callable[[Random, bool], Pair]


def _sayings(rng: Random, first: Event, second: Event) -> tuple[str, str]:
    """Both events in two different forms; concepts may change their names in the second sentence."""
    forms = tuple(f for f in _FORMS if _possible(f, first))
    one = draw.wording(rng, forms)
    other = draw.reworded(rng, one, tuple(f for f in forms if f != one.form), 0.25)
    return say(first, one), say(second, other)


def _possible(form: Form, event: Event) -> bool:
    """Whether the form differs from the others for this event."""
    if form.endswith("time_first"):
        return event.time is not None
    return event.place is not None if form.endswith("place_first") else True


def _roles(rng: Random, same: bool) -> Pair:
    """Who does it to whom."""
    found = draw.detailed(rng, draw.reversible(rng), 0.5)
    first, second = _sayings(rng, found, found if same else draw.swap_roles(found))
    return Pair(first, second, int(same), (found.key(),))


def _modifiers(rng: Random, same: bool) -> Pair:
    """Which adjective belongs to which noun."""
    found = draw.detailed(rng, draw.reversible(rng), 0.4)
    one = draw.modifier(rng, found.agent.noun)
    two = draw.modifier(rng, found.patient.noun, apart=(one,))
    first = replace(found, agent=replace(found.agent, adjective=one), patient=replace(found.patient, adjective=two))
    second = replace(found, agent=replace(found.agent, adjective=two), patient=replace(found.patient, adjective=one))
    sentences = _sayings(rng, first, first if same else second)
    return Pair(*sentences, int(same), (found.key(),))


def _route(rng: Random, same: bool) -> Pair:
    """From where to where."""
    who = draw.noun(rng, ("person",))
    start, end = rng.sample(_CITIES, 2)
    subject, when = noun_phrase(Thing(who)), draw.time(rng)
    orders: list[Callable[[str, str], tuple[str, ...]]] = [
        lambda a, b: (subject, "viajó de", a, "a", b, when),
        lambda a, b: (when, subject, "viajó de", a, "a", b),
        lambda a, b: (subject, "viajó", when, "a", b, "desde", a),
        lambda a, b: ("desde", a, "viajó", subject, "a", b, when),
        lambda a, b: (when, subject, "viajó a", b, "desde", a),
    ]
    one, other = rng.sample(orders, 2)
    second = other(start, end) if same else other(end, start)
    return Pair(
        m.sentence(*one(start, end)), m.sentence(*second), int(same), (f"{who}:{min(start, end)}:{max(start, end)}",)
    )


def _counts(rng: Random, same: bool) -> Pair:
    """How many of each."""
    kind = rng.choice(("person", "animal", "fruit", "flower", "toy"))
    one, two = _same_gender(rng, kind)
    few, many = rng.sample(range(2, 8), 2)
    where, when = place_phrase(draw.place(rng)), time_phrase(draw.time(rng))
    who = noun_phrase(Thing(draw.noun(rng, ("person",), apart=(one, two))))
    things = lambda a, b: coordinate(noun_phrase(Thing(one, None, "bare", a)), noun_phrase(Thing(two, None, "bare", b)))
    turned = lambda a, b: coordinate(noun_phrase(Thing(two, None, "bare", b)), noun_phrase(Thing(one, None, "bare", a)))
    verb = "vio" if kind in ("person", "animal") else "dejó"
    personal = "a" if kind == "person" else ""
    orders: list[Callable[[int, int], tuple[str, ...]]] = [
        lambda a, b: (who, verb, personal, things(a, b), when, where),
        lambda a, b: (who, verb, personal, turned(a, b), when, where),
        lambda a, b: (when, who, verb, personal, turned(a, b), where),
        lambda a, b: (f"{where},", who, verb, personal, things(a, b), when),
    ]
    first, other = rng.sample(orders, 2)
    second = other(few, many) if same else other(many, few)
    return Pair(m.sentence(*first(few, many)), m.sentence(*second), int(same), (":".join(sorted((one, two))),))


def _same_gender(rng: Random, kind: str) -> tuple[str, str]:
    """Two nouns of a kind with one gender."""
    one = rng.choice(BY_KIND[kind])
    gender = NOUNS[one].names[0][1]
    return one, rng.choice([k for k in BY_KIND[kind] if k != one and NOUNS[k].names[0][1] == gender])


def _giving(rng: Random, same: bool) -> Pair:
    """Who gives and who gets."""
    giver, getter = _same_gender(rng, "person")
    gift = rng.choice(_GIFTS)
    what = noun_phrase(Thing(gift, rng.choice(MODIFIERS[NOUNS[gift].kind])))
    name = lambda key: noun_phrase(Thing(key))
    when = draw.time(rng)
    orders: list[Callable[[str, str], tuple[str, ...]]] = [
        lambda a, b: (name(a), "le dio", what, "a", name(b), when),
        lambda a, b: (when, name(a), "le dio", what, "a", name(b)),
        lambda a, b: ("a", name(b), "le dio", what, name(a), when),
        lambda a, b: (name(b), "recibió", what, "de", name(a), when),
        lambda a, b: (when, name(b), "recibió", what, "de", name(a)),
    ]
    one, other = rng.sample(orders, 2)
    second = other(giver, getter) if same else other(getter, giver)
    keys = (":".join([gift, *sorted((giver, getter))]),)
    return Pair(m.sentence(*one(giver, getter)), m.sentence(*second), int(same), keys)


def _order(rng: Random, same: bool) -> Pair:
    """What came first."""
    first, second = _two_deeds(rng)
    who = noun_phrase(first.agent)
    done = lambda e: f"{finite(e.verb, 'past', False)} {object_phrase(e.patient)}"
    doing = lambda e: f"{infinitive(e.verb)} {object_phrase(e.patient)}"
    orders: list[Callable[[Event, Event], tuple[str, ...]]] = [
        lambda a, b: (who, done(a), "antes de", doing(b)),
        lambda a, b: (who, done(b), "después de", doing(a)),
        lambda a, b: ("antes de", f"{doing(b)},", who, done(a)),
        lambda a, b: ("después de", f"{doing(a)},", who, done(b)),
        lambda a, b: ("primero", who, done(a), "y después", done(b)),
    ]
    one, other = rng.sample(orders, 2)
    said = other(first, second) if same else other(second, first)
    return Pair(m.sentence(*one(first, second)), m.sentence(*said), int(same), _deeds_key(first, second))


def _two_deeds(rng: Random) -> tuple[Event, Event]:
    """Two unrelated things that people do to two different objects."""
    first, second = draw.event(rng, draw.OBJECT_VERBS), draw.event(rng, draw.OBJECT_VERBS)
    while second.patient == first.patient or second.verb == first.verb:
        second = draw.event(rng, draw.OBJECT_VERBS)
    return first, second


def _deeds_key(first: Event, second: Event) -> tuple[str, ...]:
    return (":".join(sorted((first.verb, first.patient.noun, second.verb, second.patient.noun))),)


def _two_clauses(rng: Random, same: bool) -> Pair:
    """Who did which of two things."""
    people = _same_gender(rng, "person")
    deeds = _two_deeds(rng)
    acts = lambda who: tuple(replace(deed, agent=Thing(key)) for deed, key in zip(deeds, who, strict=True))
    before, after = acts(people), acts(people if same else people[::-1])
    when = draw.time(rng)
    plain = Wording()
    orders: list[Callable[[Event, Event], tuple[str, ...]]] = [
        lambda a, b: (when, clause(a, plain), "y", clause(b, plain)),
        lambda a, b: (when, clause(b, plain), "y", clause(a, plain)),
        lambda a, b: (when, clause(b, plain), "y", clause(a, Wording("passive"))),
        lambda a, b: (when, clause(a, Wording("object_first")), "y", clause(b, plain)),
    ]
    said, other = rng.sample(orders, 2)
    return Pair(m.sentence(*said(*before)), m.sentence(*other(*after)), int(same), _deeds_key(*deeds))


def _comparison(rng: Random, same: bool) -> Pair:
    """Which of two is more so; both sentences may use the opposite word."""
    found = scales.comparison(rng)
    first, other = rng.sample(found.sayings(), 2)
    second = other(found.one, found.two) if same else other(found.two, found.one)
    source = scales.source(rng, found)
    return Pair(m.sentence(source, first(found.one, found.two)), m.sentence(source, second), int(same), (found.key(),))


# The shares are such that overlap of words, or of character n-grams inside words, stays at chance over the whole set.
# Half turn on what stands next to each other (a count and its noun, a city and its preposition): a small encoder learns
# those first.
_SHARES: tuple[tuple[Pattern, int], ...] = (
    (_route, 5),
    (_counts, 4),
    (_roles, 2),
    (_modifiers, 1),
    (_comparison, 2),
    (_giving, 2),
    (_order, 1),
    (_two_clauses, 1),
)
_PATTERNS = tuple(pattern for pattern, share in _SHARES for _ in range(share))


def draw_pair(rng: Random, index: int) -> Pair | None:
    """A paraphrase for odd indices, a pair with exchanged parts for even ones."""
    pattern = _PATTERNS[index // 2 % len(_PATTERNS)]
    pair = pattern(rng, index % 2 == 1)
    return None if pair.first == pair.second else pair
