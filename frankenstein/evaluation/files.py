"""The files an evaluation leaves: metrics, all numbers, predictions, figures, and points for `dvc plots`."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from frankenstein.artifact import new_folder, write_json, write_text
from frankenstein.evaluation.evaluate import Evaluation
from frankenstein.evaluation.figures import Figure
from frankenstein.evaluation.plots import scatter_items
from frankenstein.evaluation.tables import Table, headline


def write_metrics(evaluation: Evaluation, *, embed: Path, probe: Path) -> None:
    """One short JSON file a protocol; an empty mapping for a protocol that was not asked for."""
    protocols = evaluation.facts["protocols"]
    for protocol, path in (("embed", embed), ("probe", probe)):
        tasks = protocols[protocol]["tasks"] if protocol in protocols else {}
        write_json(path, {task: headline(scored) for task, scored in tasks.items()})


def write_results(evaluation: Evaluation, figures: list[Figure], results: Path) -> None:
    """A folder with results.json (every number), <protocol>_<task>.parquet (every test pair) and the figures as SVG."""
    with new_folder(results, "evaluation") as folder:
        write_json(folder / "results.json", evaluation.facts)
        for table in evaluation.tables:
            _write_predictions(table, folder / f"{table.protocol}_{table.splits.name}.parquet")
        for figure in figures:
            write_text(folder / f"{figure.name}.svg", figure.svg)


def write_points(evaluation: Evaluation, *, similarity: Path, thresholds: Path) -> None:
    """CSV points: cosine and gold score of graded test pairs, and dev accuracy over the upper threshold."""
    tables = evaluation.of("embed")
    _write_csv(
        similarity,
        ("task", "model", "score", "cosine"),
        (p for t in tables if not t.splits.task.labels for p in _scatter(t)),
    )
    _write_csv(thresholds, ("task", "model", "threshold", "accuracy"), (p for t in tables for p in _curve(t)))


def _scatter(table: Table) -> Iterable[tuple[Any, ...]]:
    for row in table.models:
        scores = table.outcomes[row].items["score"]
        for i in scatter_items(table):
            yield table.splits.name, row, f"{table.splits.test.targets[i]:.4f}", f"{scores[i]:.4f}"


def _curve(table: Table) -> Iterable[tuple[Any, ...]]:
    for row, (_, curve) in table.curves.items():
        for cut, accuracy in curve:
            yield table.splits.name, row, f"{cut:.4f}", f"{accuracy:.4f}"


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    write_text(path, stream.getvalue())


def _write_predictions(table: Table, path: Path) -> None:
    """One row a test pair: id, target, and `<row>_<item>` of every model and baseline."""
    import pyarrow as pa
    from pyarrow import parquet

    columns: dict[str, Any] = {"id": table.splits.test.ids, "target": table.splits.test.targets}
    for row, outcome in table.outcomes.items():
        for name, values in outcome.items.items():
            columns[f"{row}_{name}"] = values.astype(np.int32 if name == "prediction" else np.float32)
    parquet.write_table(pa.table(columns), path, compression="zstd")
