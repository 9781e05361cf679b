"""The report and its figures: same bytes every time, one page that loads nothing, every text escaped."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from frankenstein.artifact import open_folder, write_json
from frankenstein.errors import FrankensteinError
from frankenstein.evaluation.curves import Curve, read_curves, smoothed
from frankenstein.evaluation.evaluate import Evaluation, score_rows
from frankenstein.evaluation.figures import Figure, figures
from frankenstein.evaluation.files import write_metrics, write_points, write_results
from frankenstein.evaluation.models import Encode
from frankenstein.evaluation.options import EvaluateOptions
from frankenstein.evaluation.page import Cell, page, paragraph, table
from frankenstein.evaluation.plots import inline
from frankenstein.evaluation.report import write_report
from tests.evaluation.toy import ToyEncoder, noise, toy_splits

VOID = {"meta", "br"}
CURVES = [Curve("", {"loss": [(i, 5 / (i + 1)) for i in range(90)], "learning_rate": [(0, 0.0), (89, 0.1)]})]
TUNING = [Curve(name, {"loss": [(1, 0.3), (2, 0.2)], "dev_spearman": [(2, 0.5)]}) for name in ("ternary", "full")]


def evaluation(*models: str, protocols: tuple[str, ...] = ("embed", "probe")) -> Evaluation:
    splits = [toy_splits(task, n=60) for task in ("xnli", "pawsx", "stsb")]
    encoders: dict[str, Encode] = {"ternary": noise, "full": ToyEncoder(*splits), "random_init": noise}
    options = EvaluateOptions(bootstrap_samples=100, protocols=protocols)
    found = score_rows([(row, encoders[row]) for row in (*models, "random_init")], splits, options, seed=0)
    data = {
        s.name: {
            "trained_on": "train", "thresholds_chosen_on": "dev", "pairs": {"fit": 60, "dev": 60, "test": 60},
            "sha256": {}, "overlap": {"test_pairs_in_train": 0},
        }
        for s in splits
    }  # fmt: skip
    return Evaluation(found.tables, {**found.facts, "data": data, "versions": {"numpy": "2"}})


@pytest.fixture(scope="module")
def both() -> Evaluation:
    return evaluation("ternary", "full")


def written(tmp_path: Path, found: Evaluation, layer: str = "retnet") -> str:
    model = {"layer_pattern": [layer], "num_layers": 2, "hidden_size": 8, "causal": False}
    write_json(tmp_path / "encoder" / "config.json", {"model": model, "vocab_size": 100})
    sizes = {"model": {"parameters": 1000, "float32": 4000, "packed": 500}}
    metrics = {
        "quantize": {"valid": {"packed": 2.5}, "size_bytes": sizes},
        "sbert": {"full": {"pairs": 60}},
        "corpus": {},
    }
    for name, values in metrics.items():
        write_json(tmp_path / f"{name}.json", values)
    drawn = figures(found, CURVES, TUNING)
    files = {name: tmp_path / f"{name}.json" for name in metrics}
    write_report(tmp_path / "report.html", found, drawn, encoder=tmp_path / "encoder", metrics=files)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Checker(HTMLParser):
    """Notes unbalanced tags, repeated ids and the words outside markup."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    return checker


def test_figures_have_the_same_bytes_each_time_and_are_well_formed(both: Evaluation) -> None:
    one, two = figures(both, CURVES, TUNING), figures(both, CURVES, TUNING)
    assert one == two
    assert len({figure.name for figure in one}) == len(one) == 7
    for figure in one:
        assert ET.fromstring(figure.svg).tag.endswith("svg")
        assert "<dc:date>" not in figure.svg


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path, both: Evaluation) -> None:
    html = written(tmp_path, both)
    checker = checked(html)
    assert html.startswith("<!DOCTYPE html>")
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(link.startswith("#") for link in checker.links)
    assert {link[1:] for link in checker.links} <= set(checker.ids)
    assert not re.search(r"https?:|@import|<script|<link|<img|src=", html)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(checker.ids)


def test_the_page_has_the_same_bytes_each_time(tmp_path: Path, both: Evaluation) -> None:
    assert written(tmp_path, both) == written(tmp_path, both)


def test_text_from_files_is_escaped(tmp_path: Path, both: Evaluation) -> None:
    html = written(tmp_path, both, layer='<script>alert("x")</script>')
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    for made in (paragraph("<b>"), table([Cell("<b>", "<i>")], [[Cell("a<b")]], caption="<u>"), page("<a>", "<b>", [])):
        assert not re.search(r"<[bui]>|a<b|<h1><a>", made)


def test_numbers_and_names_are_on_the_page(tmp_path: Path, both: Evaluation) -> None:
    text = " ".join(checked(written(tmp_path, both)).text)
    scored = both.facts["protocols"]["embed"]["tasks"]["stsb"]["rows"]["ternary"]["metrics"]["spearman"]
    assert f"{scored['value']:.3f}" in text
    for words in (
        "trained on train, 60 pairs",
        "thresholds: dev",
        "fine-tuned on 60 training pairs",
        "0.004 MB",
        "seed 0",
    ):
        assert words in text


@pytest.mark.parametrize(("present", "absent"), [("ternary", "full"), ("full", "ternary")])
def test_an_absent_model_is_named_and_nothing_breaks(tmp_path: Path, present: str, absent: str) -> None:
    found = evaluation(present)
    text = " ".join(checked(written(tmp_path, found)).text)
    assert f"{absent}: not part of this experiment" in text
    pairs = found.facts["protocols"]["embed"]["tasks"]["stsb"]["comparisons"]
    assert {c["first"] for c in pairs} == {present}


def test_one_protocol_alone_makes_a_report_and_an_empty_file_for_the_other(tmp_path: Path) -> None:
    found = evaluation("full", protocols=("embed",))
    assert "Protocol: probe" not in written(tmp_path, found)
    write_metrics(found, embed=tmp_path / "embed.json", probe=tmp_path / "probe.json")
    assert json.loads((tmp_path / "probe.json").read_text()) == {}


def test_metrics_hold_one_interval_a_row(tmp_path: Path, both: Evaluation) -> None:
    write_metrics(both, embed=tmp_path / "embed.json", probe=tmp_path / "probe.json")
    embed = json.loads((tmp_path / "embed.json").read_text())
    full = embed["xnli"]["full"]
    assert set(full) == {"ap", "accuracy", "macro_f1", "ci95"}
    assert full["ci95"] == [1.0, 1.0]
    low, high = embed["stsb"]["ternary"]["ci95"]
    assert low <= embed["stsb"]["ternary"]["spearman"] <= high


def test_results_hold_every_prediction_and_have_the_same_bytes_each_time(tmp_path: Path, both: Evaluation) -> None:
    from pyarrow import parquet

    drawn = [Figure("a", "A", "caption", "<svg/>")]
    for name in ("one", "two"):
        write_results(both, drawn, tmp_path / name)
        open_folder(tmp_path / name, "evaluation")
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()
    rows = parquet.read_table(tmp_path / "one/probe_xnli.parquet")
    hits = np.asarray(rows["full_prediction"]) == np.asarray(rows["target"])
    facts = json.loads((tmp_path / "one/results.json").read_text())
    assert facts["protocols"]["probe"]["tasks"]["xnli"]["rows"]["full"]["metrics"]["accuracy"]["value"] == hits.mean()


def test_points_for_plots(tmp_path: Path, both: Evaluation) -> None:
    write_points(both, similarity=tmp_path / "s.csv", thresholds=tmp_path / "t.csv")
    similarity, thresholds = ((tmp_path / n).read_text().splitlines() for n in ("s.csv", "t.csv"))
    assert similarity[0] == "task,model,score,cosine"
    assert len(similarity) == 1 + 2 * 60
    assert thresholds[0] == "task,model,threshold,accuracy"
    assert {line.split(",")[0] for line in thresholds[1:]} == {"xnli", "pawsx"}


def test_curves_are_read_by_model_and_empty_cells_left_out(tmp_path: Path) -> None:
    file = tmp_path / "curve.csv"
    file.write_text("step,model,loss,dev_spearman\n1,full,0.5,\n2,full,0.4,0.7\n1,ternary,0.6,\n")
    full, ternary = read_curves(file)
    assert (full.name, full.series) == ("full", {"loss": [(1, 0.5), (2, 0.4)], "dev_spearman": [(2, 0.7)]})
    assert ternary.series == {"loss": [(1, 0.6)]}


def test_a_damaged_curve_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "curve.csv"
    file.write_text("step,loss\n1,0.5\n2,bad\n")
    with pytest.raises(FrankensteinError, match=r"curve\.csv:3: expected a step and numbers"):
        read_curves(file)
    with pytest.raises(FrankensteinError, match=r"none\.csv: cannot be read"):
        read_curves(tmp_path / "none.csv")


def test_smoothing_averages_neighbours() -> None:
    points = [(i, float(i)) for i in range(1, 7)]
    assert smoothed(points, width=3) == [(2, 1.5), (4, 3.5), (6, 5.5)]
    assert smoothed(points, width=10) == points


def test_inline_pictures_keep_their_references_and_get_a_label() -> None:
    svg = '<svg width="3" viewBox="0 0 1 1"><path id="a"/><use xlink:href="#a" clip-path="url(#a)"/></svg>'
    made = inline(svg, "x", 'a "b"')
    assert 'id="x-a"' in made
    assert 'href="#x-a"' in made
    assert "url(#x-a)" in made
    assert 'aria-label="a &quot;b&quot;"' in made
