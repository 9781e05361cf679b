"""Inference about single events: details, general words, other voices, denial, and attempts.

Labels: 0 entailment, 1 neutral, 2 contradiction.
"""

from dataclasses import replace
from random import Random

from frankenstein.text.sample import draw
from frankenstein.text.sample import morphology as m
from frankenstein.text.sample.grammar import (
    ACTIVE_FORMS,
    PASSIVE_FORMS,
    Event,
    Form,
    Thing,
    coordinate,
    finite,
    infinitive,
    noun_name,
    noun_phrase,
    object_phrase,
    place_phrase,
    say,
    time_phrase,
)
from frankenstein.text.sample.lexicon import HYPERNYMS, NOUNS, VERBS
from frankenstein.text.sample.splits import Pair

_PLAIN_FORMS: tuple[Form, ...] = (*ACTIVE_FORMS, *PASSIVE_FORMS)
_FORMS: tuple[Form, ...] = (*_PLAIN_FORMS, "object_first")


def _general(thing: Thing, article: str) -> Thing:
    return Thing(HYPERNYMS[NOUNS[thing.noun].kind][0], None, article)


def _can_generalise(thing: Thing) -> bool:
    return NOUNS[thing.noun].kind in HYPERNYMS


def _words(rng: Random, event: Event, forms: tuple[Form, ...] = _FORMS) -> str:
    """The event in one of the forms that its determiners allow."""
    if event.patient.article == "none":
        forms = ACTIVE_FORMS
    elif "indefinite" in (event.agent.article, event.patient.article):
        forms = tuple(f for f in forms if f in _PLAIN_FORMS)
    return say(event, draw.wording(rng, forms, 0.4))


def _more_details(rng: Random, event: Event) -> Event:
    """The event with at least one more of place, time and modifiers."""
    found = replace(event, place=event.place or draw.place(rng)) if rng.random() < 0.5 else event
    if found.time is None and (rng.random() < 0.5 or found == event):
        found = replace(found, time=draw.time(rng))
    if rng.random() < 0.4 and found.patient.adjective is None and found.patient.noun not in _GENERAL:
        found = replace(found, patient=replace(found.patient, adjective=draw.modifier(rng, found.patient.noun)))
    return found


_GENERAL = frozenset(word for word, _ in HYPERNYMS.values())


def _with_infinitive(rng: Random, event: Event, leads: tuple[str, ...]) -> str:
    """ "El médico quería comprar el coche": agent, lead, infinitive, patient, details."""
    done = f"{infinitive(event.verb, rng.randrange(2))} {object_phrase(event.patient)}"
    return m.sentence(
        noun_phrase(event.agent), rng.choice(leads), done, time_phrase(event.time), place_phrase(event.place)
    )


def _managed(rng: Random, specific: Event) -> str:
    return _with_infinitive(rng, specific, ("consiguió", "logró", "pudo por fin"))


def _wanted(rng: Random, specific: Event) -> str:
    """He meant to do it; whether he did is open."""
    leads = ("quería", "intentó")
    person = NOUNS[specific.agent.noun].kind == "person"
    return _with_infinitive(rng, specific, (*leads, "pensaba", "esperaba") if person else leads)


def _wanted_and(rng: Random, specific: Event, happened: bool) -> str:
    """He wanted to do it, and it is told whether he did."""
    clitic = m.pronoun(noun_name(specific.patient)[1], many=False)
    done = f"{infinitive(specific.verb, rng.randrange(2))} {object_phrase(specific.patient)}"
    end = "y al final" if happened else "pero al final no"
    return m.sentence(
        time_phrase(specific.time),
        noun_phrase(specific.agent),
        f"quería {done}{'' if happened else ','} {end}",
        clitic,
        finite(specific.verb, "past", False),
        place_phrase(specific.place),
    )


def _failed(rng: Random, specific: Event) -> str:
    """He did not do it; only people refuse."""
    leads = ("no consiguió", "no logró", "no pudo")
    return _with_infinitive(
        rng, specific, (*leads, "se negó a") if NOUNS[specific.agent.noun].kind == "person" else leads
    )


def _nobody(rng: Random, specific: Event) -> str:
    """Nobody of the agent's kind did it."""
    nobody = "nadie" if NOUNS[specific.agent.noun].kind == "person" else "ningún animal"
    verb = finite(specific.verb, "past", False, rng.randrange(2))
    return m.sentence(
        nobody, verb, object_phrase(specific.patient), time_phrase(specific.time), place_phrase(specific.place)
    )


def _nothing(rng: Random, specific: Event) -> str:
    """The agent did it to nothing or nobody at all."""
    nothing = {"person": "a nadie", "animal": "a ningún ser vivo"}.get(NOUNS[specific.patient.noun].kind, "nada")
    verb = finite(specific.verb, "past", False, rng.randrange(2))
    return m.sentence(noun_phrase(specific.agent), "no", verb, nothing, time_phrase(specific.time))


def _neither(rng: Random, specific: Event) -> str:
    """The agent did it neither to the patient nor to another of its kind."""
    verb = finite(specific.verb, "past", False, rng.randrange(2))
    both = [f"ni {object_phrase(thing)}" for thing in rng.sample(_two_patients(rng, specific), 2)]
    return m.sentence(noun_phrase(specific.agent), "no", verb, *both, time_phrase(specific.time))


def _two_patients(rng: Random, specific: Event) -> list[Thing]:
    kind = NOUNS[specific.patient.noun].kind
    other = Thing(draw.noun(rng, (kind,), apart=(specific.patient.noun, specific.agent.noun)))
    return [specific.patient, other]


def _both(rng: Random, specific: Event) -> str:
    """The agent did it to the patient and to another of its kind."""
    verb = finite(specific.verb, "past", False, rng.randrange(2))
    one, other = (object_phrase(thing) for thing in rng.sample(_two_patients(rng, specific), 2))
    return m.sentence(
        time_phrase(specific.time),
        noun_phrase(specific.agent),
        verb,
        coordinate(one, other),
        place_phrase(specific.place),
    )


def _happened(rng: Random, specific: Event) -> str:
    """The event took place, told in one of several ways, always with more details than asked for."""
    fuller = _more_details(rng, specific)
    kind = rng.random()
    if kind < 0.12:
        return _managed(rng, fuller)
    if kind < 0.27:
        return _wanted_and(rng, fuller, happened=True)
    return _both(rng, fuller) if kind < 0.4 else _words(rng, fuller)


def _did_not(rng: Random, specific: Event) -> str:
    """The very event did not take place; nothing is said about other places."""
    kind = rng.random()
    bare = replace(specific, place=None, negated=True)
    if kind < 0.12:
        return _failed(rng, bare)
    if kind < 0.27:
        return _wanted_and(rng, bare, happened=False)
    if kind < 0.38:
        return _nobody(rng, bare)
    return _neither(rng, bare) if kind < 0.5 else _words(rng, bare)


def _other_fact(rng: Random, specific: Event, negated: bool) -> tuple[str, Event]:
    """Something about the same agent and patient that neither needs nor excludes the event."""
    verb, agent, patient = VERBS[specific.verb], NOUNS[specific.agent.noun].kind, NOUNS[specific.patient.noun].kind
    fits = [v for v in VERBS.values() if agent in v.agents and patient in v.patients and v.group != verb.group]
    kind = rng.random()
    if kind < 0.25 or not fits:
        return _wanted(rng, _more_details(rng, specific)), specific
    if kind < 0.6 and agent in verb.patients and patient in verb.agents:
        other = draw.swap_roles(_more_details(rng, specific))
    else:
        other = replace(_more_details(rng, specific), verb=rng.choice(fits).key)
    return (_did_not if negated else _happened)(rng, other), other


def _less_said(rng: Random, specific: Event, said: Event) -> tuple[str, Event] | None:
    """A premise that leaves out what the hypothesis adds: a general word, or another kind of detail."""
    if (said.place or said.time) and rng.random() < 0.6:
        if said.place:
            told = replace(specific, place=None, time=draw.time(rng))
        else:
            told = replace(specific, time=None, place=draw.place(rng))
        return _words(rng, told), told
    plain = said.agent == specific.agent and said.patient == specific.patient
    if not plain or said.agent.adjective or said.patient.adjective:
        return None
    told = replace(specific, agent=_general(specific.agent, "indefinite"))
    if _can_generalise(specific.patient) and rng.random() < 0.5:
        told = replace(specific, patient=_general(specific.patient, "indefinite"))
    told = _more_details(rng, told)
    return _words(rng, told), told


def _base(shape: Random, rng: Random) -> Event:
    return draw.reversible(rng) if shape.random() < 0.35 else draw.event(rng)


def positive(shape: Random, rng: Random, label: int) -> Pair:
    """The hypothesis says that something happened."""
    specific = _base(shape, rng)
    general, detail = (
        shape.choice(("", "", "", "agent", "patient")),
        shape.choice(("", "", "place", "time", "adjective")),
    )
    if detail == "place":
        specific = replace(specific, place=draw.place(rng))
    elif detail == "time":
        specific = replace(specific, time=draw.time(rng))
    said = specific
    if general == "agent":
        said = replace(said, agent=_general(said.agent, "indefinite"))
    elif general == "patient" and _can_generalise(said.patient):
        said = replace(said, patient=_general(said.patient, "indefinite"))
    elif detail == "adjective":
        modified = replace(specific.agent, adjective=draw.modifier(rng, specific.agent.noun))
        said = specific = replace(specific, agent=modified)
    premise, told = _positive_premise(rng, specific, said, label)
    return Pair(premise, _words(rng, said), label, (told.key(), said.key()))


def _positive_premise(rng: Random, specific: Event, said: Event, label: int) -> tuple[str, Event]:
    if label == 0:
        return _happened(rng, specific), specific
    if label == 1:
        less = _less_said(rng, specific, said) if rng.random() < 0.4 else None
        return less or _other_fact(rng, specific, rng.random() < 0.3)
    if said.agent.article == "indefinite":
        return _nobody(rng, specific), said
    if said.patient.article == "indefinite":
        none = replace(said, patient=_general(specific.patient, "none"), place=None, negated=True)
        return (_nothing(rng, specific) if rng.random() < 0.3 else _words(rng, none)), said
    return _did_not(rng, specific), specific


def negative(shape: Random, rng: Random, label: int) -> Pair:
    """The hypothesis says that something did not happen."""
    specific = _base(shape, rng)
    if shape.random() < 0.3:
        specific = replace(specific, time=draw.time(rng))
    said = replace(specific, negated=True)
    if shape.random() < 0.3 and _can_generalise(said.patient):
        said = replace(said, patient=_general(said.patient, "none"))
    if label == 0:
        premise, told = _negative_entailed(rng, specific, said), said
    elif label == 1:
        premise, told = _other_fact(rng, specific, rng.random() < 0.5)
    else:
        premise, told = _happened(rng, specific), specific
    return Pair(premise, _words(rng, said), label, (told.key(), said.key()))


def _negative_entailed(rng: Random, specific: Event, said: Event) -> str:
    if said.patient.article == "none":
        return _nothing(rng, specific) if rng.random() < 0.5 else _words(rng, said)
    if _can_generalise(specific.patient) and rng.random() < 0.3:
        none = replace(said, patient=_general(specific.patient, "none"))
        return _nothing(rng, specific) if rng.random() < 0.4 else _words(rng, none)
    return _did_not(rng, specific)
