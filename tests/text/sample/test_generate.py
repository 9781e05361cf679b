import hashlib
import os
import subprocess
import sys
from itertools import islice

import pytest

from frankenstein.errors import FrankensteinError
from frankenstein.text.sample.generate import MAX_CORPUS, MAX_PAIRS, corpus, pairs
from frankenstein.text.sample.splits import split_of

TASKS = ("xnli", "pawsx", "stsb")
_DIGEST = """
import hashlib
from frankenstein.text.sample.generate import corpus, pairs
found = [list(corpus(300, 4))] + [pairs(task, "dev", 60, 4) for task in ("xnli", "pawsx", "stsb")]
print(hashlib.sha256(repr(found).encode()).hexdigest())
"""


def test_another_process_with_another_hash_seed_gives_the_same_sample() -> None:
    found = [list(corpus(300, 4))] + [pairs(task, "dev", 60, 4) for task in TASKS]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    run = subprocess.run([sys.executable, "-c", _DIGEST], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256(repr(found).encode()).hexdigest()


def test_importing_the_sample_imports_no_torch() -> None:
    code = "import sys, frankenstein.text.sample.generate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [0, 1, 1337])
def test_no_pair_is_in_two_splits_or_twice_in_one(task: str, seed: int) -> None:
    seen: set[frozenset[str]] = set()
    for split, count in (("train", 1200), ("dev", 150), ("test", 150)):
        # Splits must stay apart under different seeds too.
        found = [frozenset(s.lower() for s in p[:2]) for p in pairs(task, split, count, seed + len(split))]
        assert len(found) == count
        assert all(len(pair) == 2 for pair in found)
        assert len(set(found)) == count
        assert not seen & set(found)
        seen |= set(found)


def test_a_pair_with_a_held_out_combination_is_never_a_training_pair() -> None:
    keys = [f"verb:{i}" for i in range(200)]
    held = [key for key in keys if split_of((key,)) != "train"]
    assert 20 <= len(held) <= 60
    assert all(
        split_of((keys[0], key)) != "train" and split_of((key, keys[0])) == split_of((keys[0], key)) for key in held
    )


def test_corpus_texts_are_distinct_and_a_prefix_of_the_longer_corpus() -> None:
    texts = list(corpus(20_000, 0))
    assert len(set(texts)) == 20_000
    assert list(islice(corpus(60_000, 0), 500)) == texts[:500]
    assert texts[:500] != list(corpus(500, 1))


def test_corpus_texts_are_written_correctly() -> None:
    for text in corpus(5000, 3):
        assert text[0].isupper() or text[0] in "«"
        assert text.endswith(".")
        padded = f" {text.lower()} "
        wrong = (" a el ", " de el ", "  ", " y i", " la águila", " la hacha", " el persona", "..", " ,", " none ")
        assert not [w for w in wrong if w in padded], text


def test_corpus_has_negation_passives_numbers_and_stories() -> None:
    texts = list(corpus(3000, 0))
    share = lambda condition: sum(map(condition, texts)) / len(texts)
    assert share(lambda t: " no " in f" {t.lower()}") > 0.1
    assert share(lambda t: " por " in t) > 0.15
    assert share(lambda t: any(c.isdigit() for c in t)) > 0.005
    assert share(lambda t: ". " in t) > 0.05


@pytest.mark.parametrize(
    ("task", "split", "told"), [("xnl", "train", "did you mean 'xnli'"), ("stsb", "valid", "train, dev, test")]
)
def test_unknown_names_are_errors_that_list_the_known_ones(task: str, split: str, told: str) -> None:
    with pytest.raises(FrankensteinError, match=told):
        pairs(task, split, 10, 0)


def test_asking_for_more_than_the_grammar_gives_is_an_error() -> None:
    with pytest.raises(FrankensteinError, match=str(MAX_PAIRS["test"])):
        pairs("stsb", "test", MAX_PAIRS["test"] + 1, 0)
    with pytest.raises(FrankensteinError, match=str(MAX_CORPUS)):
        corpus(MAX_CORPUS + 1, 0)
    assert pairs("pawsx", "dev", 0, 0) == []
