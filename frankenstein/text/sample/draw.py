"""Random meanings and wordings: what the lexicon allows, drawn evenly."""

from dataclasses import replace
from random import Random

from frankenstein.text.sample.grammar import Event, Form, Thing, Wording
from frankenstein.text.sample.lexicon import ANIMATE, BY_KIND, MODIFIERS, NOUNS, PLACES, TIMES, VERBS, Verb

ANIMATE_VERBS = tuple(v for v in VERBS.values() if any(kind in ANIMATE for kind in v.patients))
OBJECT_VERBS = tuple(v for v in VERBS.values() if any(kind not in ANIMATE for kind in v.patients))
# Both roles of these can be filled by the same kind, so agent and patient can be exchanged.
REVERSIBLE_VERBS = tuple(v for v in VERBS.values() if set(v.agents) & set(v.patients))


def seeded(*names: object) -> Random:
    """A generator that depends only on these names, not on the process."""
    return Random(":".join(str(name) for name in names))


def noun(rng: Random, kinds: tuple[str, ...], *, apart: tuple[str, ...] = ()) -> str:
    """A specific noun of one of the kinds, other than those in `apart`."""
    pool = [key for key in BY_KIND[rng.choice(kinds)] if key not in apart]
    return rng.choice(pool)


def modifier(rng: Random, key: str, *, apart: tuple[str, ...] = ()) -> str:
    """An adjective that can modify the noun."""
    return rng.choice([a for a in MODIFIERS[NOUNS[key].kind] if a not in apart])


def place(rng: Random, apart: str | None = None) -> str:
    """A place other than `apart`."""
    return rng.choice([key for key in PLACES if key != apart])


def time(rng: Random, tense: str = "past", apart: str | None = None) -> str:
    """A time that fits the tense, other than `apart`."""
    table = TIMES["future" if tense == "future" else "past"]
    return rng.choice([names[0] for names in table if names[0] != apart])


def event(rng: Random, verbs: tuple[Verb, ...] = ()) -> Event:
    """Agent, verb and patient, without details, in the past."""
    if not verbs:
        verbs = ANIMATE_VERBS if rng.random() < 0.45 else OBJECT_VERBS
    verb = rng.choice(verbs)
    allowed = tuple(k for k in verb.patients if (k in ANIMATE) == (verbs is not OBJECT_VERBS)) or verb.patients
    agent = noun(rng, verb.agents)
    return Event(Thing(agent), verb.key, Thing(noun(rng, allowed, apart=(agent,))))


def reversible(rng: Random) -> Event:
    """An event whose agent and patient are different nouns of one kind and gender, so that they can be exchanged."""
    verb = rng.choice(REVERSIBLE_VERBS)
    kind = rng.choice([k for k in verb.agents if k in verb.patients])
    agent = noun(rng, (kind,))
    gender = NOUNS[agent].names[0][1]
    others = [key for key in BY_KIND[kind] if key != agent and NOUNS[key].names[0][1] == gender]
    return Event(Thing(agent), verb.key, Thing(rng.choice(others)))


def detailed(rng: Random, bare: Event, chance: float = 0.5) -> Event:
    """The event with a place, a time and modifiers, each with this chance."""
    found = bare
    if rng.random() < chance:
        found = replace(found, place=place(rng))
    if rng.random() < chance:
        found = replace(found, time=time(rng, found.tense))
    if rng.random() < chance:
        found = replace(found, agent=replace(found.agent, adjective=modifier(rng, found.agent.noun)))
    if rng.random() < chance:
        found = replace(found, patient=replace(found.patient, adjective=modifier(rng, found.patient.noun)))
    return found


def swap_roles(found: Event) -> Event:
    """Agent and patient exchanged, modifiers moving with their nouns."""
    return replace(found, agent=found.patient, patient=found.agent)


def wording(rng: Random, forms: tuple[Form, ...], synonyms: float = 0.5) -> Wording:
    """One of the forms, each concept by its second name with the chance `synonyms`."""
    second = lambda: int(rng.random() < synonyms)
    return Wording(rng.choice(forms), second(), second(), second(), second(), second(), second())


def reworded(rng: Random, old: Wording, forms: tuple[Form, ...], synonyms: float) -> Wording:
    """Another wording: any of the forms, each name changed with the chance `synonyms`."""
    other = lambda name: name ^ int(rng.random() < synonyms)
    names = (other(name) for name in (old.agent, old.verb, old.patient, old.modifier, old.place, old.time))
    return Wording(rng.choice(forms), *names)
