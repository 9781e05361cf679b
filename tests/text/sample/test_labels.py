"""The labels are checked against meanings worked out by hand, and against what a shortcut could learn."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

from frankenstein.text.sample import draw, nli_facts, paraphrase, similarity
from frankenstein.text.sample.generate import pairs
from frankenstein.text.sample.grammar import Event, Thing
from frankenstein.text.sample.scales import Comparison

BASE = Event(Thing("gato", "negro"), "perseguir", Thing("perro"), "parque", "ayer")
GRADES = [
    (BASE, 5.0),
    (Event(Thing("gato", "negro"), "perseguir", Thing("perro"), "parque"), 4.5),
    (Event(Thing("gato", "negro"), "perseguir", Thing("perro"), "plaza", "ayer"), 4.0),
    (Event(Thing("gato", "negro"), "perseguir", Thing("animal"), "parque", "ayer"), 4.5),
    (Event(Thing("gato", "negro"), "seguir", Thing("perro"), "parque", "ayer"), 3.0),
    (Event(Thing("gato", "negro"), "perseguir", Thing("perro"), "parque", "ayer", negated=True), 2.0),
    (Event(Thing("perro"), "perseguir", Thing("gato", "negro"), "parque", "ayer"), 2.0),
    (Event(Thing("lobo"), "seguir", Thing("perro"), "parque", "ayer"), 1.5),
    (Event(Thing("médica.f"), "perseguir", Thing("turista.m"), "parque", "ayer"), 1.0),
    (Event(Thing("médica.f"), "leer", Thing("libro"), "parque", "ayer"), 0.5),
    (Event(Thing("médica.f"), "leer", Thing("libro")), 0.0),
]


@pytest.mark.parametrize(("other", "expected"), GRADES)
def test_similarity_follows_the_documented_scale(other: Event, expected: float) -> None:
    assert similarity.score(BASE, other) == expected
    assert similarity.score(other, BASE) == expected


def test_the_four_comparisons_mean_the_same() -> None:
    said = [
        saying("médico.m", "maestra.f") for saying in Comparison("médico.m", "maestra.f", "caro", "coche").sayings()
    ]
    assert said == [
        "el coche de el médico es más caro que el de la maestra",
        "el coche de la maestra es menos caro que el de el médico",
        "el coche de la maestra es más barato que el de el médico",
        "el coche de el médico es menos barato que el de la maestra",
    ]


AMOUNTS = {"exactamente 5": (5, 5), "más de 3": (4, np.inf), "menos de 5": (0, 4), "al menos 5": (5, np.inf)}
RELATIONS = [
    ("exactamente 5", "más de 3", 0),
    ("exactamente 5", "menos de 5", 2),
    ("más de 3", "exactamente 5", 1),
    ("al menos 5", "más de 3", 0),
    ("al menos 5", "menos de 5", 2),
]


@pytest.mark.parametrize(("premise", "hypothesis", "label"), RELATIONS)
def test_numbers_entail_or_exclude_each_other_as_arithmetic_says(premise: str, hypothesis: str, label: int) -> None:
    amounts = [nli_facts.Amount(words, *AMOUNTS[words]) for words in (premise, hypothesis)]
    assert nli_facts.relation(*amounts) == label


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_and_scores_are_balanced(seed: int) -> None:
    assert Counter(t for *_, t in pairs("xnli", "test", 300, seed)) == {0: 100, 1: 100, 2: 100}
    assert Counter(t for *_, t in pairs("pawsx", "test", 300, seed)) == {0: 150, 1: 150}
    scores = [t for *_, t in pairs("stsb", "test", 300, seed)]
    assert all(0.0 <= t <= 5.0 for t in scores)
    assert all(0.08 <= share / 300 <= 0.30 for share in Counter(round(t) for t in scores).values())
    assert {round(t) for t in scores} == {0, 1, 2, 3, 4, 5}


def test_exchanged_pairs_use_the_words_of_their_paraphrases() -> None:
    """Where no synonym is used, both sentences of an exchanged pair consist of the same content words."""
    rng = draw.seeded("content words")
    found = [paraphrase.draw_pair(rng, 2 * i) for i in range(400)]
    content = [
        [sorted(w for w in s.strip(".").lower().split() if len(w) > 4) for s in (p.first, p.second)] for p in found if p
    ]
    assert sum(first == second for first, second in content) > 80


@pytest.mark.parametrize("seed", [0, 1])
def test_the_hypothesis_alone_does_not_tell_the_inference_label(seed: int) -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = pairs("xnli", "train", 1500, seed), pairs("xnli", "test", 600, seed)
    words = CountVectorizer(token_pattern=r"\w+", ngram_range=(1, 2))
    model = LogisticRegression(max_iter=1000).fit(words.fit_transform([p[1] for p in train]), [p[2] for p in train])
    assert model.score(words.transform([p[1] for p in test]), [p[2] for p in test]) <= 0.45
    lengths = {label: np.mean([len(p[1].split()) for p in train if p[2] == label]) for label in (0, 1, 2)}
    assert max(lengths.values()) - min(lengths.values()) < 0.5


VECTORS = {
    "set of words": {"token_pattern": r"\w+", "binary": True, "use_idf": False},
    "words": {"token_pattern": r"\w+"},
    "characters": {"analyzer": "char", "ngram_range": (3, 5)},
    "characters within words": {"analyzer": "char_wb", "ngram_range": (3, 5)},
}


@cache
def _test_pairs(task: str) -> list:
    return pairs(task, "test", 1000, 5)


def _cosines(found: list, options: dict) -> np.ndarray:
    from sklearn.feature_extraction.text import TfidfVectorizer

    first, second = [p[0] for p in found], [p[1] for p in found]
    vectors = TfidfVectorizer(**options).fit(first + second)
    return np.asarray(vectors.transform(first).multiply(vectors.transform(second)).sum(axis=1)).ravel()


@pytest.mark.parametrize("options", VECTORS.values(), ids=VECTORS.keys())
def test_overlap_of_words_does_not_tell_paraphrases(options: dict) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    found = _test_pairs("pawsx")
    cosines, labels = _cosines(found, options), [p[2] for p in found]
    # N-grams that span two words see which count stands before which noun; those inside a word see nothing.
    most = 0.65 if options.get("analyzer") == "char" else 0.60
    assert 0.40 <= roc_auc_score(labels, cosines) <= most
    assert 0.40 <= average_precision_score(labels, cosines) <= most


@pytest.mark.parametrize("options", VECTORS.values(), ids=VECTORS.keys())
def test_overlap_of_words_does_not_give_similarity_away(options: dict) -> None:
    from scipy.stats import spearmanr

    found = _test_pairs("stsb")
    assert 0.3 < spearmanr(_cosines(found, options), [p[2] for p in found]).statistic < 0.70


@pytest.mark.parametrize("task", ["xnli", "pawsx", "stsb"])
def test_the_vocabulary_of_the_pairs_is_moderate(task: str) -> None:
    words = {w.strip(".,").lower() for p in pairs(task, "train", 3000, 0) for s in p[:2] for w in s.split()}
    assert len(words) <= 900
