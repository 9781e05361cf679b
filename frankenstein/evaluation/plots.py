"""The figures of the report as SVG text. Same numbers, same bytes; text and axes take the page's colour."""

import html
import re
from collections.abc import Callable
from io import StringIO
from typing import Any

import numpy as np

from frankenstein.evaluation.curves import Curve, smoothed
from frankenstein.evaluation.metrics import point, reliability, spearman
from frankenstein.evaluation.tables import Table

# Read well on white and on near-black; matplotlib draws ink in a stand-in colour that becomes the page's own.
COLOURS = {"ternary": "#d9722e", "full": "#3d85d1", "pretrained": "#7a8f5a", "random_init": "#9a86b8"}
OTHER = "#8a8f98"
INK = "#010203"
_STYLE: Any = {
    "svg.hashsalt": "frankenstein", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"], "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.titlesize": 9, "axes.grid": True, "legend.frameon": False, "legend.fontsize": 8, "grid.color": OTHER,
    "grid.alpha": 0.25, "grid.linewidth": 0.5, "lines.linewidth": 1.6,
}  # fmt: skip
SCATTER_ITEMS = 300
# Confidence bins with fewer test pairs are noise and are not drawn.
_FEWEST = 10


def pretraining(curves: list[Curve]) -> str:
    """Loss and validation loss over the learning rate, by step."""

    def draw(figure: Any) -> None:
        loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _losses(loss_axes, curves)
        for curve in curves:
            if rates := curve.series.get("learning_rate"):
                rate_axes.plot(*zip(*rates, strict=True), color=_colour(curve.name))
        rate_axes.set(xlabel="step", ylabel="learning rate")

    return _svg(draw, 5.2, 3.6)


def fine_tuning(curves: list[Curve]) -> str:
    """Loss of sentence fine-tuning over Spearman's correlation on dev, by step, one line a model."""

    def draw(figure: Any) -> None:
        loss_axes, dev_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        _losses(loss_axes, curves)
        for curve in curves:
            if points := curve.series.get("dev_spearman"):
                dev_axes.plot(*zip(*points, strict=True), "o-", markersize=3.5, color=_colour(curve.name))
        dev_axes.set(xlabel="step", ylabel="Spearman, dev")

    return _svg(draw, 5.2, 3.6)


def similarity(table: Table) -> str:
    """Cosine against the gold score of a graded task, one panel a fine-tuned model."""
    shown = scatter_items(table)

    def draw(figure: Any) -> None:
        for axes, row in zip(
            figure.subplots(1, len(table.models), sharey=True, squeeze=False)[0], table.models, strict=True
        ):
            truth, scores = table.splits.test.targets, table.outcomes[row].items["score"]
            axes.scatter(truth[shown], scores[shown], s=9, alpha=0.55, color=COLOURS[row], linewidths=0)
            axes.set(xlabel="gold score", title=f"{row}: Spearman {point(spearman, truth, scores):.3f}")
        figure.axes[0].set(ylabel="cosine")

    return _svg(draw, 5.2, 3.0)


def thresholds(tables: list[Table]) -> str:
    """Dev accuracy as the upper threshold moves; the dot is the chosen one."""

    def draw(figure: Any) -> None:
        for axes, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
            for row, (chosen, curve) in table.curves.items():
                axes.plot(curve[:, 0], curve[:, 1], color=COLOURS[row], label=row)
                axes.plot(*curve[curve[:, 0] == chosen].T, "o", color=COLOURS[row], markersize=5)
            axes.set(xlabel="cosine threshold", title=table.splits.name)
        figure.axes[0].set(ylabel="accuracy on dev")
        figure.axes[0].legend()

    return _svg(draw, 5.2, 3.0)


def calibration(tables: list[Table]) -> str:
    """Accuracy of the probe against its own confidence; on the diagonal it knows how often it is right."""

    def draw(figure: Any) -> None:
        for axes, table in zip(figure.subplots(1, len(tables), squeeze=False, sharey=True)[0], tables, strict=True):
            axes.plot([0, 1], [0, 1], color=OTHER, linewidth=0.8, linestyle="--")
            for row in table.models:
                items = table.outcomes[row].items
                found = reliability(items["prediction"] == table.splits.test.targets, items["confidence"])
                bins = [b for b in found if b[0] >= _FEWEST]
                axes.plot([b[2] for b in bins], [b[1] for b in bins], "o-", markersize=4, color=COLOURS[row], label=row)
            axes.set(xlabel="confidence", title=table.splits.name, xlim=(0, 1), ylim=(0, 1))
        figure.axes[0].set(ylabel="accuracy on test")
        figure.axes[0].legend(loc="upper left")

    return _svg(draw, 5.2, 3.0)


def results(scored: dict[str, Any]) -> str:
    """Main metric of every row with its 95 % interval, a panel a task; the dashed line is the best baseline."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(len(scored), 1, squeeze=False)[:, 0]
        for axes, (task, entry) in zip(panels, scored.items(), strict=True):
            _bars(axes, task, entry)

    rows = sum(len(entry["rows"]) for entry in scored.values())
    return _svg(draw, 5.2, 0.7 * len(scored) + 0.21 * rows)


def scatter_items(table: Table) -> np.ndarray:
    """Positions of the test pairs that are drawn: at most 300, evenly spread."""
    n = len(table.splits.test)
    return np.unique(np.linspace(0, n - 1, min(n, SCATTER_ITEMS)).astype(int))


def _bars(axes: Any, task: str, entry: dict[str, Any]) -> None:
    shown = {row: e["metrics"][entry["main"]] for row, e in entry["rows"].items() if entry["main"] in e["metrics"]}
    values = np.array([metric["value"] for metric in shown.values()])
    spread = np.abs(np.array([metric["ci95"] for metric in shown.values()]).T - values)
    axes.barh(list(shown), values, xerr=spread, color=[_colour(row) for row in shown], height=0.7,
              error_kw={"elinewidth": 1, "ecolor": INK, "capsize": 2})  # fmt: skip
    axes.axvline(shown[entry["best_baseline"]]["value"], color=INK, linestyle="--", linewidth=0.8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_title(f"{task}: {entry['main']}", loc="left")
    axes.set_xlim(min(0.0, float(values.min())), None)


def _losses(axes: Any, curves: list[Curve]) -> None:
    for curve in curves:
        label = curve.name or "training"
        if points := curve.series.get("loss"):
            axes.plot(*zip(*smoothed(points), strict=True), color=_colour(curve.name), label=label)
        if points := curve.series.get("valid_loss"):
            held_out = f"{curve.name} validation".strip()
            axes.plot(
                *zip(*points, strict=True), "o--", markersize=3.5, color=_colour(curve.name), alpha=0.7, label=held_out
            )
    axes.set(ylabel="loss")
    axes.legend()


def _colour(row: str) -> str:
    return COLOURS.get(row, OTHER) if row else COLOURS["full"]


def _svg(draw: Callable[[Any], None], width: float, height: float) -> str:
    """A figure of this size (inches) as an <svg> element that scales with the page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        FigureCanvasSVG(figure)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        stream = StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def inline(svg: str, name: str, label: str) -> str:
    """The same picture for the inside of an HTML page: ids unique by `name`, no style of its own, a label (escaped)."""
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{html.escape(label)}">', svg, count=1
    )
