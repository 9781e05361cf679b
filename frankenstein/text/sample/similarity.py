"""Graded similarity: the score follows from which parts of two meanings are equal.

The scale, in the words of STS-B (Cer et al. 2017, https://arxiv.org/abs/1708.00055):
    5  equivalent: the same event in other words (synonyms, passive, another order)
    4  a minor detail differs: 0.5 off for each detail that only one sentence has and each general word
       (animal for perro), 1 off for each detail that differs; never below 3.5
    3  one important part (agent, verb or patient) differs; 0.5 off for each different detail, down to 2
    2  the same words but not the same fact: denied, or agent and patient exchanged; 0.5 off where a detail differs
    1  one of agent, verb and patient is shared; 0.5 more where the patients are of one kind
    0  nothing important is shared; 0.25 more for the same place and for the same time
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from frankenstein.text.sample import draw
from frankenstein.text.sample.grammar import ACTIVE_FORMS, PASSIVE_FORMS, Event, Form, Thing, say
from frankenstein.text.sample.lexicon import HYPERNYMS, NOUNS, VERBS, Verb
from frankenstein.text.sample.splits import Pair

_FORMS: tuple[Form, ...] = (*ACTIVE_FORMS, *PASSIVE_FORMS, "object_first")


def _noun_match(first: str, second: str) -> float:
    """1 for the same noun, 0.5 for a noun and its general word, else 0."""
    if first == second:
        return 1.0
    general = [HYPERNYMS.get(NOUNS[key].kind, ("",))[0] for key in (first, second)]
    return 0.5 if general[0] == second or general[1] == first else 0.0


def _detail_loss(first: str | None, second: str | None) -> float:
    return 0.0 if first == second else 0.5 if first is None or second is None else 1.0


def _details(first: Event, second: Event) -> list[float]:
    """The loss by place, time and the two modifiers."""
    return [
        _detail_loss(first.place, second.place),
        _detail_loss(first.time, second.time),
        _detail_loss(first.agent.adjective, second.agent.adjective),
        _detail_loss(first.patient.adjective, second.patient.adjective),
    ]


def score(first: Event, second: Event) -> float:
    """The similarity of two events on the scale above."""
    exchanged = draw.swap_roles(second)
    if first.verb == second.verb and (first.agent.noun, first.patient.noun) == (
        exchanged.agent.noun,
        exchanged.patient.noun,
    ):
        return 1.5 if any(_details(first, exchanged)) else 2.0
    matches = [_noun_match(first.agent.noun, second.agent.noun), _noun_match(first.patient.noun, second.patient.noun)]
    shared = sum(match > 0 for match in matches) + (first.verb == second.verb)
    losses = _details(first, second)
    if shared == 3 and first.negated != second.negated:
        return 1.5 if any(losses) else 2.0
    if shared == 3:
        return max(3.5, 5.0 - sum(losses) - sum(1.0 - match for match in matches))
    if shared == 2:
        return max(2.0, 3.0 - 0.5 * sum(loss > 0 for loss in losses))
    if shared == 1:
        return 1.5 if NOUNS[first.patient.noun].kind == NOUNS[second.patient.noun].kind else 1.0
    circumstances = ((first.place, second.place), (first.time, second.time))
    return 0.25 * sum(one is not None and one == other for one, other in circumstances)


def _base(rng: Random) -> Event:
    """An event with some details; people and animals act on each other in half of the draws."""
    bare = draw.reversible(rng) if rng.random() < 0.4 else draw.event(rng)
    return replace(draw.detailed(rng, bare, 0.45), negated=rng.random() < 0.25)


def _same(rng: Random, first: Event) -> Event:
    return first


def _minor(rng: Random, first: Event) -> Event:
    """A detail added, dropped or changed, or a noun replaced by its general word."""
    kind = NOUNS[first.patient.noun].kind
    change = rng.choice(("place", "time", "agent", "patient", "general"))
    if change == "general" and kind in HYPERNYMS:
        return replace(first, patient=Thing(HYPERNYMS[kind][0], first.patient.adjective))
    if change == "time":
        return replace(first, time=rng.choice((None, draw.time(rng, first.tense, first.time))))
    if change in ("agent", "patient"):
        thing = first.agent if change == "agent" else first.patient
        other = rng.choice((None, draw.modifier(rng, thing.noun, apart=(thing.adjective or "",))))
        thing = replace(thing, adjective=other)
        return replace(first, agent=thing) if change == "agent" else replace(first, patient=thing)
    return replace(first, place=rng.choice((None, draw.place(rng, first.place))))


def _flipped(rng: Random, first: Event) -> Event:
    """Denied, or roles exchanged where the lexicon allows it."""
    agent, patient = NOUNS[first.agent.noun].kind, NOUNS[first.patient.noun].kind
    verb = VERBS[first.verb]
    if agent in verb.patients and patient in verb.agents and rng.random() < 0.7:
        return draw.swap_roles(first)
    return replace(first, negated=not first.negated)


def _one_changed(rng: Random, first: Event) -> Event:
    """Another agent, verb or patient."""
    agent, patient = first.agent.noun, first.patient.noun
    change = rng.choice(("agent", "verb", "patient"))
    if change == "agent":
        return replace(
            first, agent=Thing(draw.noun(rng, (NOUNS[agent].kind,), apart=(agent, patient)), first.agent.adjective)
        )
    if change == "patient":
        other = draw.noun(rng, (NOUNS[patient].kind,), apart=(agent, patient))
        return replace(first, patient=Thing(other, first.patient.adjective))
    return replace(first, verb=rng.choice(_verbs_for(first)))


def _verbs_for(found: Event) -> list[str]:
    """Verbs of another group that take the same agent and patient."""
    agent, patient, verb = NOUNS[found.agent.noun].kind, NOUNS[found.patient.noun].kind, VERBS[found.verb]
    fits: Callable[[Verb], bool] = lambda v: agent in v.agents and patient in v.patients and v.group != verb.group
    return [v.key for v in VERBS.values() if fits(v)]


def _details_of(first: Event, other: Event, rng: Random) -> Event:
    """The other event at the same place and time, so that shared words do not tell that events are alike."""
    agent = replace(other.agent, adjective=draw.modifier(rng, other.agent.noun) if first.agent.adjective else None)
    patient = replace(
        other.patient, adjective=draw.modifier(rng, other.patient.noun) if first.patient.adjective else None
    )
    return replace(other, agent=agent, patient=patient, place=first.place, time=first.time, negated=first.negated)


def _one_shared(rng: Random, first: Event) -> Event:
    """An event that has only the agent, the verb or the patient in common."""
    verb, agent, patient = VERBS[first.verb], first.agent.noun, first.patient.noun
    shared = rng.choice(("agent", "verb", "patient"))
    if shared == "verb":
        other = Event(
            Thing(draw.noun(rng, verb.agents, apart=(agent, patient))),
            first.verb,
            Thing(draw.noun(rng, (NOUNS[patient].kind,), apart=(agent, patient))),
        )
    elif shared == "agent":
        fresh = draw.event(rng, tuple(v for v in VERBS.values() if NOUNS[agent].kind in v.agents))
        other = replace(fresh, agent=Thing(agent))
    else:
        keys = _verbs_for(first)
        verb = VERBS[rng.choice(keys)] if keys else verb
        other = Event(Thing(draw.noun(rng, verb.agents, apart=(agent, patient))), verb.key, first.patient)
    return _details_of(first, other, rng)


def _unrelated(rng: Random, first: Event) -> Event:
    """Another event altogether, told of the same place and time."""
    other = draw.event(rng)
    while VERBS[other.verb].group == VERBS[first.verb].group:
        other = draw.event(rng)
    return _details_of(first, other, rng)


def _crossed(first: Event, second: Event) -> bool:
    """Whether a noun has one role here and the other there, and the roles are not simply exchanged."""
    crossings = (first.agent.noun == second.patient.noun, first.patient.noun == second.agent.noun)
    return any(crossings) and not all(crossings)


_CHANGES = (_unrelated, _one_shared, _flipped, _one_changed, _minor, _same)


def draw_pair(rng: Random, index: int) -> Pair | None:
    """A pair whose score rounds to index mod 6."""
    wanted = index % len(_CHANGES)
    first = _base(rng)
    if _CHANGES[wanted] is _one_changed and not _verbs_for(first):
        return None
    second = _CHANGES[wanted](rng, first)
    if _crossed(first, second) or second.agent.noun == second.patient.noun:
        return None
    target = score(first, second)
    if round(target) != wanted:
        return None
    # Like sentences say their shared concepts in other words, unlike ones in the same: overlap must not tell the score.
    one = draw.wording(rng, _FORMS)
    other = draw.reworded(rng, one, _FORMS, 0.85 if wanted >= 4 else 0.25)
    pair = [say(first, one), say(second, other)]
    if rng.random() < 0.5:
        pair.reverse()
    return Pair(pair[0], pair[1], target, (first.key(), second.key()))
