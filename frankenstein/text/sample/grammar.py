"""What a sentence says (Thing, Event) and the ways of saying it (Wording); realisation with agreement."""

from dataclasses import dataclass
from typing import Literal

from frankenstein.text.sample import morphology as m
from frankenstein.text.sample.lexicon import ADJECTIVES, ANIMATE, NOUNS, PLACES, TIME_NAMES, VERBS

Form = Literal[
    "active",
    "time_first",
    "place_first",
    "passive",
    "passive_time_first",
    "passive_place_first",
    "object_first",
    "cleft",
]
ACTIVE_FORMS: tuple[Form, ...] = ("active", "time_first", "place_first")
PASSIVE_FORMS: tuple[Form, ...] = ("passive", "passive_time_first", "passive_place_first")


@dataclass(frozen=True)
class Thing:
    """A participant: noun concept, modifier concept, determiner (a kind of article) and how many."""

    noun: str
    adjective: str | None = None
    article: str = "definite"
    count: int = 1


@dataclass(frozen=True)
class Event:
    """Who does what to whom, where and when, and whether it happened; time and place are concepts or None."""

    agent: Thing
    verb: str
    patient: Thing
    place: str | None = None
    time: str | None = None
    tense: str = "past"
    negated: bool = False

    def key(self) -> str:
        """The lexical combination that decides the split; roles, tense, polarity and details do not change it."""
        return ":".join([self.verb, *sorted((self.agent.noun, self.patient.noun))])


@dataclass(frozen=True)
class Wording:
    """A way of saying an event: the order of its parts and which synonym of each concept is used."""

    form: Form = "active"
    agent: int = 0
    verb: int = 0
    patient: int = 0
    modifier: int = 0
    place: int = 0
    time: int = 0


def pick(names: tuple[str, ...], index: int) -> str:
    """The synonym with this index, counted round."""
    return names[index % len(names)]


def noun_name(thing: Thing, synonym: int = 0) -> tuple[str, str]:
    """(word, gender) of a thing's noun."""
    names = NOUNS[thing.noun].names
    return names[synonym % len(names)]


def adjective(key: str, synonym: int, gender: str, many: bool = False) -> str:
    """An adjective concept by one of its names, agreeing."""
    return m.adjective(pick(ADJECTIVES[key].names, synonym), gender, many)


def noun_phrase(thing: Thing, synonym: int = 0, modifier: int = 0, digits: bool = False) -> str:
    """Determiner or number, noun, adjective."""
    word, gender = noun_name(thing, synonym)
    many = thing.count > 1
    # Only a bare determiner is replaced by the number: "los tres niños" keeps its article.
    lead = [m.article(thing.article, word, gender, many)]
    if many and thing.article in ("bare", "definite"):
        lead.append(m.number(thing.count, gender, digits))
    parts = [*lead, m.plural(word) if many else word]
    if thing.adjective is not None:
        parts.append(adjective(thing.adjective, modifier, gender, many))
    return " ".join(part for part in parts if part)


def object_phrase(thing: Thing, synonym: int = 0, modifier: int = 0) -> str:
    """A direct object: people and animals take the preposition "a"."""
    phrase = noun_phrase(thing, synonym, modifier)
    return f"a {phrase}" if NOUNS[thing.noun].kind in ANIMATE else phrase


def place_phrase(place: str | None, synonym: int = 0) -> str:
    """ "en el parque", or nothing."""
    return "" if place is None else f"en {pick(PLACES[place], synonym)}"


def time_phrase(time: str | None, synonym: int = 0) -> str:
    """ "ayer", or nothing."""
    return "" if time is None else pick(TIME_NAMES[time], synonym)


def coordinate(first: str, second: str) -> str:
    """Two phrases joined by "y" or "e"."""
    return f"{first} {m.conjunction(second)} {second}"


def infinitive(verb: str, synonym: int = 0) -> str:
    """The infinitive of a verb concept by one of its names."""
    return pick(VERBS[verb].names, synonym)


def finite(verb: str, tense: str, many: bool, synonym: int = 0) -> str:
    """The third person of a verb concept by one of its names."""
    return m.verb(infinitive(verb, synonym), tense, "3p" if many else "3s")


def _active(event: Event, w: Wording) -> str:
    subject = noun_phrase(event.agent, w.agent, w.modifier)
    predicate = finite(event.verb, event.tense, event.agent.count > 1, w.verb)
    return f"{subject} {_no(event)}{predicate} {object_phrase(event.patient, w.patient, w.modifier)}"


def _passive(event: Event, w: Wording) -> str:
    many = event.patient.count > 1
    gender = noun_name(event.patient, w.patient)[1]
    subject = noun_phrase(event.patient, w.patient, w.modifier)
    done = m.participle(infinitive(event.verb, w.verb), gender, many)
    return f"{subject} {_no(event)}{m.be(event.tense, many)} {done} por {noun_phrase(event.agent, w.agent, w.modifier)}"


def _object_first(event: Event, w: Wording) -> str:
    clitic = m.pronoun(noun_name(event.patient, w.patient)[1], event.patient.count > 1)
    predicate = finite(event.verb, event.tense, event.agent.count > 1, w.verb)
    start = object_phrase(event.patient, w.patient, w.modifier)
    return f"{start} {_no(event)}{clitic} {predicate} {noun_phrase(event.agent, w.agent, w.modifier)}"


def _cleft(event: Event, w: Wording) -> str:
    many, gender = event.agent.count > 1, noun_name(event.agent, w.agent)[1]
    who = f"{m.article('definite', '', gender, many)} que"
    predicate = finite(event.verb, event.tense, many, w.verb)
    subject = noun_phrase(event.agent, w.agent, w.modifier)
    return (
        f"{m.be(event.tense, many)} {subject} {who} {predicate} {object_phrase(event.patient, w.patient, w.modifier)}"
    )


def _no(event: Event) -> str:
    return "no " if event.negated else ""


def clause(event: Event, w: Wording) -> str:
    """The event as a clause without capital letter and full stop."""
    place, time = place_phrase(event.place, w.place), time_phrase(event.time, w.time)
    if w.form.startswith("passive"):
        core = _passive(event, w)
    elif w.form == "object_first":
        core = _object_first(event, w)
    elif w.form == "cleft":
        core = _cleft(event, w)
    else:
        core = _active(event, w)
    if w.form.endswith("time_first") and time:
        parts = [time, core, place]
    elif w.form.endswith("place_first") and place:
        parts = [f"{place},", core, time]
    else:
        parts = [core, time, place]
    return " ".join(part for part in parts if part)


def say(event: Event, w: Wording) -> str:
    """The event as a sentence."""
    return m.sentence(clause(event, w))
