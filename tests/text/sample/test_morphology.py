import pytest

from frankenstein.text.sample import morphology as m
from frankenstein.text.sample.grammar import Event, Thing, Wording, noun_phrase, say

PLURALS = {
    "mesa": "mesas",
    "ratón": "ratones",
    "joven": "jóvenes",
    "feliz": "felices",
    "reloj": "relojes",
    "sofá": "sofás",
}
FORMS = {
    ("comprar", "past", "3s"): "compró",
    ("buscar", "past", "1s"): "busqué",
    ("recoger", "present", "1s"): "recojo",
    ("seguir", "present", "1s"): "sigo",
    ("perseguir", "past", "3p"): "persiguieron",
    ("elegir", "present", "3s"): "elige",
    ("leer", "past", "3s"): "leyó",
    ("traer", "past", "3p"): "trajeron",
    ("perder", "present", "3p"): "pierden",
    ("fotografiar", "present", "3s"): "fotografía",
    ("romper", "perfect", "3s"): "ha roto",
    ("adquirir", "future", "1p"): "adquiriremos",
    ("defender", "imperfect", "1p"): "defendíamos",
}


@pytest.mark.parametrize(("word", "expected"), PLURALS.items())
def test_plurals_follow_the_rules_and_exceptions(word: str, expected: str) -> None:
    assert m.plural(word) == expected


@pytest.mark.parametrize(("asked", "expected"), FORMS.items())
def test_verb_forms_are_those_of_a_grammar_book(asked: tuple[str, str, str], expected: str) -> None:
    assert m.verb(*asked) == expected


def test_adjectives_and_participles_agree_in_gender_and_number() -> None:
    assert m.adjective("rojo", "f", True) == "rojas"
    assert m.adjective("azul", "f", True) == "azules"
    assert m.adjective("veloz", "m", True) == "veloces"
    assert m.participle("romper", "f", True) == "rotas"
    assert m.participle("traer", "m") == "traído"


def test_feminine_nouns_with_stressed_a_take_the_masculine_article_only_in_the_singular() -> None:
    assert noun_phrase(Thing("águila", "blanco")) == "el águila blanca"
    assert noun_phrase(Thing("hacha", "negro", "indefinite")) == "un hacha negra"
    assert noun_phrase(Thing("águila", "blanco", "definite", 3)) == "las tres águilas blancas"


def test_sentences_contract_articles_and_choose_the_conjunction() -> None:
    assert m.sentence("vio", "a el gato de el médico", "de las niñas") == "Vio al gato del médico de las niñas."
    assert m.conjunction("hijos") == "e"
    assert m.conjunction("hielo") == "y"


EVENT = Event(Thing("gato", "negro"), "perseguir", Thing("vaca", "blanco"), "parque", "ayer")
SAYINGS = {
    "active": "El gato negro persiguió a la vaca blanca ayer en el parque.",
    "time_first": "Ayer el gato negro persiguió a la vaca blanca en el parque.",
    "passive": "La vaca blanca fue perseguida por el gato negro ayer en el parque.",
    "passive_place_first": "En el parque, la vaca blanca fue perseguida por el gato negro ayer.",
    "object_first": "A la vaca blanca la persiguió el gato negro ayer en el parque.",
    "cleft": "Fue el gato negro el que persiguió a la vaca blanca ayer en el parque.",
}


@pytest.mark.parametrize(("form", "expected"), SAYINGS.items())
def test_one_event_is_said_in_six_ways(form, expected: str) -> None:
    assert say(EVENT, Wording(form)) == expected


def test_plural_agents_and_denial() -> None:
    event = Event(Thing("pintora.f", "rubio", "bare", 4), "romper", Thing("silla"), tense="future", negated=True)
    assert say(event, Wording()) == "Cuatro pintoras rubias no romperán la silla."
    assert say(event, Wording("passive")) == "La silla no será rota por cuatro pintoras rubias."


def test_synonyms_of_another_gender_change_the_agreement() -> None:
    event = Event(Thing("turista.m"), "comprar", Thing("anillo", "caro"))
    assert (
        say(event, Wording("passive", patient=1, verb=1, modifier=1))
        == "La sortija costosa fue adquirida por el turista."
    )
