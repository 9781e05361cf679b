"""The evaluate stage: from the command line to metrics, predictions, figures and the report."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from frankenstein.artifact import new_folder, open_folder, write_json
from frankenstein.tasks.registry import TASKS
from frankenstein.text.pairs import Pairs, write_pairs
from stages import evaluate
from stages.runner import run
from tests.sentence.world import SENTENCES, make_world

PARAMS = """
seed: 1
threads: 1
evaluate:
  tasks: [pawsx, stsb]
  bootstrap_samples: 100
"""
OUTPUTS = ("embed", "probe", "results", "similarity", "thresholds", "report")
EARLIER = ("corpus", "tokenizer", "pretrain", "quantize", "sbert")


def random_pairs(task: str, n: int, seed: int) -> Pairs:
    rng = np.random.default_rng(seed)
    first, second = ([SENTENCES[i] for i in rng.integers(0, len(SENTENCES), n)] for _ in range(2))
    targets = rng.integers(0, 2, n) if TASKS[task].labels else rng.uniform(0, 5, n)
    return Pairs([str(i) for i in range(n)], first, second, targets)


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What the earlier stages leave: fine-tuned models, the encoder, a cache, curves and metrics."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    world = make_world(tmp_path / "world")
    shutil.copytree(world.quantized / "packed", "sbert/ternary")
    shutil.copytree(world.full, "sbert/full")
    with new_folder("cache", "corpus_cache", {"overlap": {"pawsx": {"test_pairs_in_train": 1}}}) as folder:
        for task in ("pawsx", "stsb"):
            for seed, split in enumerate(("train", "dev", "test")):
                write_pairs(folder, task, split, random_pairs(task, 40, seed))
    Path("pretrain.csv").write_text("step,loss,valid_loss,learning_rate\n1,3.0,,0.1\n2,2.5,2.6,0.05\n")
    Path("sbert.csv").write_text("step,model,loss,learning_rate,dev_spearman\n1,ternary,0.2,0.1,\n1,full,0.2,0.1,0.5\n")
    for name in EARLIER:
        write_json(f"{name}.json", {"count": 3})
    paths = {name: Path(name) for name in ("sbert", "cache")}
    curves = {"pretrain_curve": Path("pretrain.csv"), "sbert_curve": Path("sbert.csv")}
    return {**paths, **curves, "encoder": world.full, **{f"{name}_metrics": Path(f"{name}.json") for name in EARLIER}}


def call(monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Path], out: str) -> None:
    paths = {**inputs, **{name: Path(out) / name for name in OUTPUTS}}
    flags = [part for name, path in paths.items() for part in (f"--{name.replace('_', '-')}", str(path))]
    monkeypatch.setattr(sys, "argv", ["stage", *flags])
    threads = torch.get_num_threads()
    try:
        run(evaluate.main)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_the_stage_writes_everything_and_the_same_bytes_twice(
    inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for out in ("one", "two"):
        call(monkeypatch, inputs, out)
    files = sorted(p.relative_to("one") for p in Path("one").rglob("*") if p.is_file())
    assert {str(p) for p in files} >= {"embed", "probe", "similarity", "thresholds", "report", "results/results.json"}
    assert [(Path("one") / p).read_bytes() == (Path("two") / p).read_bytes() for p in files] == [True] * len(files)
    embed = json.loads(Path("one/embed").read_text())
    rows = {"ternary", "full", "pretrained", "random_init", "majority", "tfidf_word", "tfidf_char"}
    assert set(embed["pawsx"]) == set(embed["stsb"]) == rows
    facts = json.loads(Path("one/results/results.json").read_text())
    assert facts["data"]["pawsx"]["overlap"] == {"test_pairs_in_train": 1}
    assert set(facts["data"]["pawsx"]["sha256"]) == {"train.parquet", "dev.parquet", "test.parquet"}
    assert open_folder("one/results")["kind"] == "evaluation"


def test_a_missing_model_is_left_out_and_none_at_all_is_an_error(
    inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("sbert/ternary")
    call(monkeypatch, inputs, "one")
    assert "ternary" not in json.loads(Path("one/embed").read_text())["stsb"]
    shutil.rmtree("sbert/full")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, inputs, "two")
    assert stopped.value.code == 2
    assert "found neither ternary/ nor full/" in capsys.readouterr().err
    assert not Path("two").exists()


@pytest.mark.parametrize(("name", "message"), [("finetune", "is not built yet"), ("guess", "unknown protocol 'guess'")])
def test_a_protocol_that_is_not_there_is_an_error(
    inputs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    Path("params.yaml").write_text(PARAMS + f"  protocols: [{name}]\n")
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, inputs, "one")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
