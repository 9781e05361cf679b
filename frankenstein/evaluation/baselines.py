"""Scores that cost nothing, for the same tables: the most frequent label, and what bags of words and letters know.

Vocabulary and weights come from fitted and dev text only. A model that does not beat these has learned nothing the
words do not say; the hypothesis-only row shows how much of a task its second sentence gives away.
"""

from collections import Counter
from typing import Any

import numpy as np

from frankenstein.evaluation.embed import from_scores
from frankenstein.evaluation.outcome import Outcome
from frankenstein.evaluation.splits import Splits, sentences
from frankenstein.text.pairs import Pairs

_WORDS: dict[str, Any] = {"analyzer": "word", "token_pattern": r"(?u)\b\w+\b"}
_LETTERS: dict[str, Any] = {"analyzer": "char_wb", "ngram_range": (3, 5), "sublinear_tf": True}
_WORD_PAIRS: dict[str, Any] = {**_WORDS, "ngram_range": (1, 2)}


def embed_baselines(splits: Splits) -> dict[str, Outcome]:
    """Rows of the embed table: majority, and TF-IDF cosine of words and of letter 3-5-grams."""
    return {
        "majority": _majority(splits),
        "tfidf_word": _tfidf_cosine(splits, _WORDS),
        "tfidf_char": _tfidf_cosine(splits, _LETTERS),
    }


def probe_baselines(splits: Splits) -> dict[str, Outcome]:
    """Rows of the probe table: majority, and TF-IDF logistic regression; graded tasks: majority and letter cosine."""
    if not splits.task.labels:
        return {"majority": _majority(splits), "tfidf_char": _tfidf_cosine(splits, _LETTERS)}
    majority = _majority(splits)
    return {
        "majority": Outcome({"prediction": majority.items["prediction"]}, majority.settings),
        "hypothesis_only": _tfidf_logistic(splits, hypothesis_only=True),
        "tfidf_logreg": _tfidf_logistic(splits, hypothesis_only=False),
    }


def _majority(splits: Splits) -> Outcome:
    """The most frequent fitted label (the lowest of equals) for every pair, or one constant score."""
    n = len(splits.test)
    if not splits.task.labels:
        return Outcome({"score": np.zeros(n)})
    counts = Counter(splits.fit.targets.tolist())
    label = min(counts, key=lambda value: (-counts[value], value))
    items = {"score": np.zeros(n), "prediction": np.full(n, label)}
    return Outcome(items, {"label": splits.task.labels[int(label)], "trained_on": splits.trained_on})


def _tfidf_cosine(splits: Splits, settings: dict[str, Any]) -> Outcome:
    """Cosine of TF-IDF vectors as the score."""
    vectorizer = _fitted(splits, settings)
    dev, test = (_row_cosine(*_transformed(vectorizer, pairs)) for pairs in (splits.dev, splits.test))
    return from_scores(splits.task, dev, splits.dev.targets, test)


def _tfidf_logistic(splits: Splits, hypothesis_only: bool) -> Outcome:
    """Logistic regression (C = 1) on word 1-2-grams of the second sentence, or of both with their cosine."""
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    vectorizer = _fitted(splits, _WORD_PAIRS)

    def features(pairs: Pairs) -> Any:
        first, second = _transformed(vectorizer, pairs)
        if hypothesis_only:
            return second
        cosines = sparse.csr_matrix(_row_cosine(first, second)[:, None])
        return sparse.csr_matrix(sparse.hstack([first, second, cosines]))

    model = LogisticRegression(C=1.0, max_iter=1000).fit(features(splits.fit), splits.fit.targets)
    chances = model.predict_proba(features(splits.test))
    items = {"prediction": model.classes_[chances.argmax(axis=1)], "confidence": chances.max(axis=1)}
    return Outcome(items, {"C": 1.0, "trained_on": splits.trained_on, "training_pairs": len(splits.fit)})


def _fitted(splits: Splits, settings: dict[str, Any]) -> Any:
    """A TF-IDF vectorizer fitted on the distinct sentences that are not test sentences."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(**settings).fit(sentences(splits.fit, splits.dev))


def _transformed(vectorizer: Any, pairs: Pairs) -> tuple[Any, Any]:
    return vectorizer.transform(pairs.first), vectorizer.transform(pairs.second)


def _row_cosine(first: Any, second: Any) -> np.ndarray:
    """Row products (n,) of two sparse matrices whose rows have length 1 (or 0)."""
    return np.asarray(first.multiply(second).sum(axis=1)).ravel()
