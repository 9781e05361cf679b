"""The evaluation: every task under every protocol, models and baselines side by side."""

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from frankenstein.artifact import MANIFEST, open_folder, read_json
from frankenstein.errors import FrankensteinError, NotBuiltYetError
from frankenstein.evaluation.baselines import embed_baselines, probe_baselines
from frankenstein.evaluation.embed import alignment, cosine, from_scores, geometry, threshold_curve
from frankenstein.evaluation.models import Encode, Vectors, model_rows
from frankenstein.evaluation.options import EvaluateOptions
from frankenstein.evaluation.outcome import FINE_TUNED
from frankenstein.evaluation.probe import probe
from frankenstein.evaluation.splits import Splits, read_splits, sentences
from frankenstein.evaluation.tables import Table, score

log = logging.getLogger(__name__)

PROTOCOLS = {
    "embed": "cosine of the two sentence vectors; labels come from thresholds chosen on dev",
    "probe": "linear model on frozen vectors: [u, v, |u-v|, u*v] for classes, [|u-v|, u*v] for graded tasks",
}
ANNOUNCED = ("finetune", "mlm")


@dataclass(frozen=True)
class Evaluation:
    """Tables with every prediction, and `facts`: all numbers as plain values, the content of results.json."""

    tables: list[Table]
    facts: dict[str, Any]

    def of(self, protocol: str) -> list[Table]:
        """The tables of one protocol, in the order of the tasks."""
        return [table for table in self.tables if table.protocol == protocol]


def evaluate(*, sbert: Path, encoder: Path, cache: Path, options: EvaluateOptions, seed: int) -> Evaluation:
    """Score the fine-tuned models, the pretrained and a random encoder, and the free baselines.

    Args:
        sbert: folder with `ternary/` and `full/` (one may be absent).
        encoder: the pretrained encoder. cache: the corpus cache.
    Raises:
        FrankensteinError: for a task without pairs, an unknown protocol, or a damaged model.
    """
    _check_protocols(options.protocols)
    seen = open_folder(cache, "corpus_cache").get("overlap", {})
    tasks = [read_splits(cache, name).capped(options.probe_train_pairs, seed) for name in options.tasks]
    rows = model_rows(sbert, encoder, seed=seed, batch_size=options.batch_size)
    with _one_blas_thread():
        evaluation = score_rows(rows, tasks, options, seed)
    facts = {**evaluation.facts, "data": _data(tasks, cache, seen), "versions": _versions()}
    return Evaluation(evaluation.tables, facts)


def score_rows(
    rows: Iterable[tuple[str, Encode]], tasks: list[Splits], options: EvaluateOptions, seed: int
) -> Evaluation:
    """The evaluation of any models, given as (row, function from sentences to vectors)."""
    tables = {(p, s.name): Table(p, s, {}, {}) for p in options.protocols for s in tasks}
    shapes: dict[str, Any] = {}
    texts = sentences(*(pairs for s in tasks for pairs in _needed(s, options.protocols)))
    for row, encode in rows:
        log.info("evaluate: %s, %d sentences", row, len(texts))
        vectors = Vectors(row, texts, encode)
        for splits in tasks:
            shapes.setdefault(splits.name, {})[row] = _shape(splits, vectors)
            if "embed" in options.protocols:
                _add_embed(tables["embed", splits.name], row, vectors)
            if "probe" in options.protocols:
                tables["probe", splits.name].outcomes[row] = probe(splits, vectors, seed)
    log.info("evaluate: baselines and intervals")
    free = {"embed": embed_baselines, "probe": probe_baselines}
    for table in tables.values():
        table.outcomes.update(free[table.protocol](table.splits))
    scored: dict[str, Any] = {p: {"protocol": PROTOCOLS[p], "tasks": {}} for p in options.protocols}
    for (protocol, task), table in tables.items():
        scored[protocol]["tasks"][task] = score(table, options.bootstrap_samples, seed)
    settings = {
        "seed": seed,
        "bootstrap_samples": options.bootstrap_samples,
        "interval": "95 % percentile bootstrap",
    }
    return Evaluation(list(tables.values()), {"protocols": scored, "geometry": shapes, "settings": settings})


def _one_blas_thread() -> AbstractContextManager[Any]:
    """numpy, scipy and scikit-learn on one thread: sums that do not depend on the core count, and faster small ones."""
    import scipy.linalg  # noqa: F401  the limit reaches only libraries that are loaded
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    return threadpool_limits(limits=1, user_api="blas")


def _check_protocols(names: Iterable[str]) -> None:
    for name in names:
        if name in ANNOUNCED:
            raise NotBuiltYetError(f"evaluate.protocols: {name!r} is not built yet; built: {', '.join(PROTOCOLS)}")
        if name not in PROTOCOLS:
            raise FrankensteinError(f"evaluate.protocols: unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")


def _needed(splits: Splits, protocols: Iterable[str]) -> list[Any]:
    """The pairs whose vectors are read; without the probe, training pairs are not."""
    return [splits.dev, splits.test, *([splits.fit] if "probe" in protocols else [])]


def _add_embed(table: Table, row: str, vectors: Vectors) -> None:
    splits = table.splits
    dev, test = (cosine(vectors(p.first), vectors(p.second)) for p in (splits.dev, splits.test))
    table.outcomes[row] = from_scores(splits.task, dev, splits.dev.targets, test)
    if splits.task.labels and row in FINE_TUNED:
        table.curves[row] = threshold_curve(splits.task, dev, splits.dev.targets)


def _shape(splits: Splits, vectors: Vectors) -> dict[str, Any]:
    """Geometry of a model's vectors of the test sentences."""
    test, task = splits.test, splits.task
    if task.score_range is not None:
        low, high = task.score_range
        similar = test.targets >= low + 0.8 * (high - low)
    else:
        similar = test.targets == task.similar
    aligned = alignment(cosine(vectors(test.first), vectors(test.second)), np.asarray(similar))
    return {**geometry(vectors(sentences(test))), **({} if aligned is None else {"alignment": aligned})}


def _data(tasks: list[Splits], cache: Path, seen: dict[str, Any]) -> dict[str, Any]:
    """Per task: pairs and sha256 of every split, what was fitted and chosen on, what was seen before."""
    files = read_json(cache / MANIFEST)["files"]
    facts = {}
    for splits in tasks:
        prefix = f"tasks/{splits.name}/"
        sha = {name.removeprefix(prefix): entry["sha256"] for name, entry in files.items() if name.startswith(prefix)}
        facts[splits.name] = {
            "trained_on": splits.trained_on,
            "thresholds_chosen_on": splits.chosen_on,
            "pairs": {"fit": len(splits.fit), "dev": len(splits.dev), "test": len(splits.test)},
            "sha256": sha,
            "overlap": seen.get(splits.name, {}),
        }
    return facts


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("numpy", "scikit-learn", "scipy", "torch")}
