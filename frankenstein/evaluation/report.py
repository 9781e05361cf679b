"""reports/report.html: the whole experiment on one page that needs no network."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from frankenstein.artifact import CONFIG, read_json, write_text
from frankenstein.evaluation.evaluate import Evaluation
from frankenstein.evaluation.figures import Figure
from frankenstein.evaluation.outcome import FINE_TUNED
from frankenstein.evaluation.page import Cell, bullets, columns, figure, heading, page, paragraph, table
from frankenstein.evaluation.plots import inline

ROW_NAMES = {
    "ternary": "packed ternary, as deployed",
    "full": "full-precision parent, fine-tuned the same way",
    "pretrained": "pretrained encoder, not fine-tuned, mean pooling",
    "random_init": "same architecture, fresh weights",
    "majority": "most frequent label, or a constant",
    "tfidf_word": "cosine of word TF-IDF",
    "tfidf_char": "cosine of letter 3-5-gram TF-IDF",
    "hypothesis_only": "word 1-2-grams of the second sentence only",
    "tfidf_logreg": "word 1-2-grams of both sentences and their cosine",
}
_MODEL_KEYS = (
    "layer_pattern", "num_layers", "num_loops", "hidden_size", "num_heads", "ffn_hidden_size", "vocab_size",
    "norm_type", "positions", "causal", "use_bitnet", "use_moe",
)  # fmt: skip
_NOT_BYTES = ("weights", "parameters", "ratio_to_float32")
_HOW_TO_READ = (
    "Every result is on test pairs, which nothing was fitted or chosen on. The small line is its 95 % interval "
    "(percentile bootstrap over the test pairs); the star marks the best value of a column.",
    "embed: the cosine of the two vectors decides. ap is average precision of similar against dissimilar pairs "
    "(neutral ones left out); accuracy uses thresholds chosen on dev.",
    "probe: a linear model trained on frozen vectors, on the pairs named under the task. It is not comparable with "
    "embed, nor with fine-tuning a whole model on the task.",
    "A model is only as good as its distance from the baselines: hypothesis_only shows how much of a task one "
    "sentence gives away, random_init what the architecture does untrained.",
    "Differences are on the same pairs and the same resamples, first minus second. An interval that holds 0 means that "
    "this test set cannot tell the two apart.",
)


def write_report(
    path: Path, evaluation: Evaluation, figures: list[Figure], *, encoder: Path, metrics: Mapping[str, Path]
) -> None:
    """Write the report.

    Args:
        encoder: the pretrained encoder's folder; metrics: title -> JSON file of small nested numbers from an earlier
            stage, among them "quantize".
    """
    facts = evaluation.facts
    earlier = {title: read_json(file) for title, file in metrics.items()}
    config = read_json(encoder / CONFIG)
    present = [row for row in FINE_TUNED if row in next(iter(evaluation.tables)).outcomes]
    results = [f for f in figures if f.name.startswith("results_")]
    others = [f for f in figures if f not in results]
    sections = [
        ("experiment", "The experiment", _experiment(config, facts, present, earlier.get("sbert", {}))),
        ("results", "Results", "\n".join(_protocol(name, facts, results) for name in facts["protocols"])),
        ("curves", "Curves and checks", columns(*(_figure(f) for f in others)) if others else ""),
        ("size", "Size and quantization", _quantization(earlier.pop("quantize", {}))),
        ("geometry", "Geometry of the vectors", _geometry(facts["geometry"])),
        ("data", "Data", _data(facts["data"])),
        (
            "stages",
            "Earlier stages",
            columns(*(heading(t) + _nested(values) for t, values in earlier.items() if values)),
        ),
        ("reading", "How to read this", bullets(_HOW_TO_READ)),
    ]
    layers = ", ".join(config["model"]["layer_pattern"])
    model, seed = config["model"], facts["settings"]["seed"]
    lead = f"{model['num_layers']} layers of {layers}; width {model['hidden_size']}; seed {seed}."
    write_text(path, page("Frankenstein: evaluation report", lead, sections))


def _experiment(config: dict[str, Any], facts: dict[str, Any], present: list[str], sbert: dict[str, Any]) -> str:
    known = {**config["model"], "vocab_size": config["vocab_size"]}
    model = [[Cell(key), Cell(_text(known[key]))] for key in _MODEL_KEYS if key in known]
    numbers = {**facts["settings"], **facts["versions"]}
    setup = [[Cell(key.replace("_", " ")), Cell(str(value))] for key, value in numbers.items()]
    lines = [f"{row}: {ROW_NAMES[row]}{_fine_tuned_on(sbert.get(row, {}))}." for row in present]
    lines += [f"{row}: not part of this experiment." for row in FINE_TUNED if row not in present]
    head = [Cell("setting"), Cell("value")]
    return bullets(lines) + columns(table(head, model), table(head, setup))


def _fine_tuned_on(summary: dict[str, Any]) -> str:
    """The training set of a fine-tuned model, as far as its metrics tell."""
    tasks = [task for task in summary.get("dev_spearman", {}) if task != "mean"]
    named = f" of {', '.join(tasks)}" if tasks else ""
    return f"; fine-tuned on {summary['pairs']:,} training pairs{named}" if "pairs" in summary else ""


def _protocol(name: str, facts: dict[str, Any], figures: list[Figure]) -> str:
    """Table of all rows over all tasks, the comparisons, and the picture of one protocol."""
    scored = facts["protocols"][name]
    parts = [
        heading(f"Protocol: {name}"),
        paragraph(f"{scored['protocol'].capitalize()}.", soft=True),
        _results(name, scored["tasks"], facts["data"]),
    ]
    caption = "Paired differences of the main metric, first row minus second."
    header = [Cell("rows", "task, metric"), Cell("difference", "95 % interval"), Cell("p"), Cell("McNemar p")]
    compared = table(header, _comparisons(scored["tasks"]), caption=caption)
    pictures = [_figure(f) for f in figures if f.name == f"results_{name}"]
    return "\n".join([*parts, columns(compared, *pictures)])


def _results(protocol: str, tasks: dict[str, Any], data: dict[str, Any]) -> str:
    keys = [(task, metric) for task, entry in tasks.items() for metric in _metric_names(entry)]
    names = list(dict.fromkeys(row for entry in tasks.values() for row in entry["rows"]))
    header = [Cell("row"), *(Cell(f"{task} {metric}", _trained(protocol, data[task], metric)) for task, metric in keys)]
    rows = [
        [Cell(name, ROW_NAMES.get(name, "")), *(_metric(tasks[task], name, metric) for task, metric in keys)]
        for name in names
    ]
    return table(header, rows, caption="Tinted: the fine-tuned models.", marked=FINE_TUNED)


def _metric_names(entry: dict[str, Any]) -> list[str]:
    """The metrics shown; macro_f1 stands in results.json only, to keep the table narrow."""
    found = dict.fromkeys(metric for row in entry["rows"].values() for metric in row["metrics"])
    return [metric for metric in found if metric != "macro_f1"]


def _trained(protocol: str, facts: dict[str, Any], metric: str) -> str:
    """What was chosen or trained on the task for this column."""
    if protocol == "probe":
        return f"trained on {facts['trained_on']}, {facts['pairs']['fit']:,} pairs"
    return f"thresholds: {facts['thresholds_chosen_on']}" if metric == "accuracy" else "nothing chosen"


def _metric(entry: dict[str, Any], row: str, metric: str) -> Cell:
    values = {name: r["metrics"][metric] for name, r in entry["rows"].items() if metric in r["metrics"]}
    if row not in values:
        return Cell("n/a")
    low, high = values[row]["ci95"]
    best = max(v["value"] for v in values.values())
    return Cell(f"{values[row]['value']:.3f}", f"{low:.3f} to {high:.3f}", best=values[row]["value"] == best)


def _comparisons(tasks: dict[str, Any]) -> list[list[Cell]]:
    rows = []
    for task, entry in tasks.items():
        for found in entry["comparisons"]:
            if entry["main"] not in found["differences"]:
                continue
            d = found["differences"][entry["main"]]
            gap = Cell(f"{d['difference']:+.3f}", f"{d['low']:+.3f} to {d['high']:+.3f}")
            split = _mcnemar(found["mcnemar"]) if "mcnemar" in found else Cell("n/a")
            pair = Cell(f"{found['first']} - {found['second']}", f"{task} {entry['main']}")
            rows.append([pair, gap, Cell(_p(d["p"])), split])
    return rows


def _mcnemar(found: dict[str, Any]) -> Cell:
    return Cell(_p(found["p"]), f"{found['only_first_correct']} : {found['only_second_correct']} pairs")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _geometry(tasks: dict[str, Any]) -> str:
    keys = ("anisotropy", "uniformity", "alignment", "zero_vectors")
    rows = [
        [Cell(row, task), *(Cell(_text(values.get(key, "n/a"))) for key in keys)]
        for task, models in tasks.items()
        for row, values in models.items()
    ]
    caption = (
        "Anisotropy: mean cosine of two different test sentences (0 spread out, 1 all alike). Uniformity: lower is "
        "more even. Alignment: mean squared distance of similar pairs, lower is closer. Read the last two together."
    )
    return table(
        [Cell("row", "task"), *(Cell(key.replace("_", " ")) for key in keys)], rows, caption=caption, marked=FINE_TUNED
    )


def _data(tasks: dict[str, Any]) -> str:
    overlaps = list(dict.fromkeys(key for facts in tasks.values() for key in facts["overlap"]))
    header = [
        Cell("task"),
        Cell("trained on"),
        Cell("pairs", "fit / dev / test"),
        *(Cell(key.replace("_", " ")) for key in overlaps),
    ]
    rows = []
    for task, facts in tasks.items():
        counts = " / ".join(f"{facts['pairs'][split]:,}" for split in ("fit", "dev", "test"))
        seen = (Cell(_text(facts["overlap"].get(key, "n/a"))) for key in overlaps)
        rows.append([Cell(task), Cell(facts["trained_on"]), Cell(counts), *seen])
    caption = "Overlap: exact copies, ignoring case. Digests of every file stand in results.json."
    return table(header, rows, caption=caption)


def _quantization(values: dict[str, Any]) -> str:
    """Sizes in each number format, and the other numbers of the quantize stage."""
    sizes = values.get("size_bytes", {})
    rest = _nested({key: value for key, value in values.items() if key != "size_bytes"})
    return columns(_sizes(sizes), rest) if sizes else rest


def _sizes(parts: dict[str, dict[str, Any]]) -> str:
    forms = dict.fromkeys(form for part in parts.values() for form in part)
    rows = [[Cell(form.replace("_", " ")), *(Cell(_size(form, part)) for part in parts.values())] for form in forms]
    caption = "Sizes in MB (10^6 bytes). two_bit, base3 and theory count weights alone, packed counts their scales too."
    return table([Cell("form"), *(Cell(name.replace("_", " ")) for name in parts)], rows, caption=caption)


def _size(form: str, part: dict[str, Any]) -> str:
    if form not in part:
        return "n/a"
    return _text(part[form]) if form in _NOT_BYTES else f"{part[form] / 1e6:,.3f} MB"


def _nested(values: dict[str, Any]) -> str:
    """Nested numbers as a table of dotted keys; empty for no values."""
    rows = [[Cell(key), Cell(_text(value))] for key, value in _flat(values, "")]
    return table([Cell("key"), Cell("value")], rows) if rows else ""


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    """A value for reading: whole numbers with separators, 4 digits of a fraction."""
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(found: Figure) -> str:
    return figure(inline(found.svg, found.name, found.title), found.title, found.caption)
