"""Texts of the corpus: the grammar of the pairs, with more tenses, plurals, subordinate clauses and mini-stories."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from frankenstein.text.sample import draw, nli, paraphrase, scales
from frankenstein.text.sample import morphology as m
from frankenstein.text.sample.grammar import (
    ACTIVE_FORMS,
    PASSIVE_FORMS,
    Event,
    Form,
    Thing,
    adjective,
    clause,
    finite,
    infinitive,
    noun_name,
    noun_phrase,
    object_phrase,
    pick,
    place_phrase,
    say,
    time_phrase,
)
from frankenstein.text.sample.lexicon import ADJECTIVES, ANIMATE, BY_KIND, HYPERNYMS, NOUNS, OPPOSITES, SPECIFIC, VERBS

_FORMS: tuple[Form, ...] = (*ACTIVE_FORMS, *PASSIVE_FORMS, "object_first")
_CLAUSE_FORMS: tuple[Form, ...] = ("active", "time_first", "passive", "object_first")
_SYNONYMS = tuple(
    names for names in [v.names for v in VERBS.values()] + [a.names for a in ADJECTIVES.values()] if len(names) == 2
)
_QUALITIES = ("nuevo", "usado", "caro", "barato", "bonito", "feo", "pesado", "ligero", "limpio", "sucio")


def _full_event(rng: Random) -> Event:
    """An event with details, in any tense, with plurals and denial."""
    bare = draw.reversible(rng) if rng.random() < 0.3 else draw.event(rng)
    tense = rng.choice(("past", "past", "past", "past", "past", "future", "perfect", "imperfect", "present"))
    found = replace(bare, tense=tense, negated=rng.random() < 0.2)
    if rng.random() < 0.2:
        found = replace(
            found, agent=replace(found.agent, count=rng.randrange(2, 10), article=rng.choice(("bare", "definite")))
        )
    if rng.random() < 0.15:
        found = replace(found, patient=replace(found.patient, count=rng.randrange(2, 10)))
    found = draw.detailed(rng, found, 0.45)
    return found if tense in ("past", "future") else replace(found, time=None)


def _event(rng: Random) -> str:
    event = _full_event(rng)
    # The passive of a present or imperfect is correct, and nobody says it.
    forms = _FORMS if event.tense in ("past", "future", "perfect") else (*ACTIVE_FORMS, "object_first")
    return say(event, draw.wording(rng, forms, 0.4))


def _of_pairs(rng: Random) -> str:
    """One sentence, never both, of a pair as the tasks have them."""
    task = nli if rng.random() < 0.6 else paraphrase
    pair = task.draw_pair(rng, rng.randrange(100_000))
    if pair is None:
        return _event(rng)
    return pair.first if rng.random() < 0.5 else pair.second


def _relative(rng: Random) -> str:
    """ "La caja que compró el médico está sucia." """
    event = draw.event(rng, draw.OBJECT_VERBS)
    kind = NOUNS[event.patient.noun].kind
    quality = rng.choice(OPPOSITES.get(kind) or ("grande",))
    gender = noun_name(event.patient)[1]
    copula = "es" if ADJECTIVES[quality].copula == "ser" else "está"
    verb = m.verb(infinitive(event.verb, rng.randrange(2)), "past")
    return m.sentence(
        noun_phrase(event.patient),
        "que",
        verb,
        noun_phrase(event.agent),
        time_phrase(draw.time(rng)),
        rng.choice(("", "no")),
        copula,
        adjective(quality, rng.randrange(2), gender),
    )


def _contrast(rng: Random) -> str:
    """ "El coche no es caro, sino barato.", "El médico no compró una pera, sino una manzana." """
    if rng.random() < 0.5:
        kind = rng.choice([kind for kind in OPPOSITES if OPPOSITES[kind]])
        thing = Thing(draw.noun(rng, (kind,)))
        quality = rng.choice(OPPOSITES[kind])
        gender = noun_name(thing)[1]
        copula = "es" if ADJECTIVES[quality].copula == "ser" else "está"
        owner = "" if kind in ANIMATE else f"de {noun_phrase(Thing(draw.noun(rng, ('person',))))}"
        against = adjective(scales.opposite(quality), rng.randrange(2), gender)
        return m.sentence(noun_phrase(thing), owner, "no", copula, f"{adjective(quality, 0, gender)},", "sino", against)
    event = draw.event(rng, draw.OBJECT_VERBS)
    kind = NOUNS[event.patient.noun].kind
    other = Thing(draw.noun(rng, (kind,), apart=(event.patient.noun, event.agent.noun)), article="indefinite")
    wrong = replace(event, patient=replace(event.patient, article="indefinite"), negated=True)
    return m.sentence(f"{clause(wrong, draw.wording(rng, ('active',)))},", "sino", object_phrase(other))


def _counted(rng: Random) -> str:
    """How many there are, in digits or words, and between which numbers that lies."""
    word, gender = noun_name(Thing(draw.noun(rng, ("person", "animal", "vehicle", "furniture", "flower", "container"))))
    value = rng.randrange(3, 11)
    amount = m.number(value, gender, digits=rng.random() < 0.5)
    less, more = m.NUMBERS[rng.randrange(2, value)], m.NUMBERS[rng.randrange(value + 1, 12)]
    told = m.sentence(place_phrase(draw.place(rng)), "hay", amount, m.plural(word)).removesuffix(".")
    return f"{told}: más de {less} y menos de {more}."


def _first_person(rng: Random) -> str:
    """ "Ayer compré una manzana roja en el mercado." """
    verb = rng.choice([v for v in draw.OBJECT_VERBS if "person" in v.agents])
    denied = rng.random() < 0.4
    article = rng.choice(("definite", "none" if denied else "indefinite"))
    key = draw.noun(rng, tuple(k for k in verb.patients if k not in ANIMATE))
    thing = Thing(key, draw.modifier(rng, key), article)
    tense = rng.choice(("past", "past", "future"))
    predicate = m.verb(pick(verb.names, rng.randrange(2)), tense, rng.choice(("1s", "1p")))
    where = place_phrase(draw.place(rng)) if rng.random() < 0.6 else ""
    return m.sentence(
        time_phrase(draw.time(rng, tense)), "no" if denied else "", predicate, object_phrase(thing), where
    )


def _reported(rng: Random) -> str:
    """Subordinate clauses: what somebody said or thinks, and why or when somebody did something."""
    event = replace(draw.detailed(rng, draw.event(rng), 0.3), negated=rng.random() < 0.2)
    told = clause(event, draw.wording(rng, _CLAUSE_FORMS, 0.4))
    speaker = noun_phrase(Thing(draw.noun(rng, ("person",), apart=(event.agent.noun, event.patient.noun))))
    lead = rng.choice(("dijo que", "cree que", "contó que", "sabe que", "recordó que"))
    if rng.random() < 0.6:
        return m.sentence(speaker, lead, told)
    moved = m.verb(rng.choice(("llegar", "entrar", "salir")), "past")
    return m.sentence("cuando", moved, f"{speaker},", told)


def _definition(rng: Random) -> str:
    """Which kind a thing is of, which words mean the same, which are opposites."""
    choice = rng.random()
    if choice < 0.6:
        thing = rng.choice([noun for noun in SPECIFIC if noun.kind in HYPERNYMS])
        word, gender = HYPERNYMS[thing.kind]
        name, own = rng.choice(thing.names)
        general = f"{m.article('indefinite', word, gender, False)} {word}"
        return m.sentence(m.article("indefinite", name, own, False), name, "es", general)
    if choice < 0.8:
        one, other = rng.choice(_SYNONYMS)
        return m.sentence(f"«{one}» significa lo mismo que «{other}»")
    quality = rng.choice([key for key, entry in ADJECTIVES.items() if entry.antonym])
    return m.sentence(f"lo contrario de «{quality}» es «{scales.opposite(quality)}»")


def _bought(rng: Random) -> str:
    """A story: something bought, what it is like, where it is now."""
    kind = rng.choice(("vehicle", "furniture", "instrument", "garment", "device", "container", "toy", "jewel"))
    thing, who = Thing(rng.choice(BY_KIND[kind])), noun_phrase(Thing(draw.noun(rng, ("person",))))
    gender = noun_name(thing)[1]
    quality = rng.choice([key for key in _QUALITIES if kind in ADJECTIVES[key].kinds])
    copula = "era" if ADJECTIVES[quality].copula == "ser" else "estaba"
    verb = m.verb(rng.choice(("comprar", "adquirir", "elegir", "encontrar")), "past")
    first = m.sentence(
        time_phrase(draw.time(rng)),
        who,
        verb,
        noun_phrase(replace(thing, article="indefinite")),
        place_phrase(draw.place(rng)),
    )
    second = m.sentence(noun_phrase(thing), copula, rng.choice(("", "muy")), adjective(quality, 0, gender))
    third = m.sentence(
        "después",
        m.pronoun(gender, False),
        rng.choice(("dejó", "vendió", "perdió", "usó")),
        place_phrase(draw.place(rng)),
    )
    return f"{first} {second} {third}" if rng.random() < 0.5 else f"{first} {second}"


def _met(rng: Random) -> str:
    """A story: somebody finds an animal or a person, takes care of it, and what became of it."""
    kind = rng.choice(("animal", "person"))
    finder = draw.noun(rng, ("person",))
    other = Thing(draw.noun(rng, (kind,), apart=(finder,)))
    found = replace(
        Event(Thing(finder), "encontrar", replace(other, article="indefinite")),
        place=draw.place(rng),
        time=draw.time(rng),
    )
    first = say(found, draw.wording(rng, ACTIVE_FORMS))
    subject, gender = ("el animal", "m") if kind == "animal" else ("", noun_name(other)[1])
    state = rng.choice(("enfermo", "nervioso", "tranquilo", "triste", "dormido"))
    second = m.sentence(subject, "estaba", m.adjective(state, gender, False))
    helped = m.verb(rng.choice(("ayudar", "cuidar", "curar", "sanar", "rescatar", "salvar")), "past")
    third = m.sentence(noun_phrase(Thing(finder)), m.pronoun(noun_name(other)[1], False), helped)
    return f"{first} {second} {third}" if rng.random() < 0.6 else f"{first} {third}"


def _two_events(rng: Random) -> str:
    """Two things that one person did one after the other."""
    first = draw.detailed(rng, draw.event(rng), 0.3)
    second = replace(draw.event(rng, draw.OBJECT_VERBS), agent=first.agent)
    start = say(first, draw.wording(rng, ACTIVE_FORMS))
    if NOUNS[first.agent.noun].kind != "person":
        return start
    lead = rng.choice(("después", "más tarde", "luego"))
    then = m.sentence(lead, finite(second.verb, "past", False, rng.randrange(2)), object_phrase(second.patient))
    return f"{start} {then}"


_MAKERS: tuple[tuple[Callable[[Random], str], int], ...] = (
    (_event, 40),
    (_of_pairs, 25),
    (_counted, 4),
    (_relative, 6),
    (_contrast, 7),
    (_first_person, 5),
    (_reported, 6),
    (_definition, 1),
    (_bought, 4),
    (_met, 3),
    (_two_events, 3),
)
_WEIGHTED = tuple(maker for maker, share in _MAKERS for _ in range(share))


def draw_text(rng: Random) -> str:
    """One item of the corpus: a sentence or a story of two or three."""
    return rng.choice(_WEIGHTED)(rng)
