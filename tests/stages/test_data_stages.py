"""The stages cache_parquet and tokenize, as the pipeline calls them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from frankenstein.params import load_params
from frankenstein.text.shards import TokenRows
from frankenstein.text.tokenizer import Tokenizer
from stages import cache_parquet, tokenize

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "data.sample_sentences": 800,
    "data.sample_pairs": 60,
    "data.sample_eval_pairs": 60,
    "model.vocab_size": 700,
    "training.max_length": 64,
}


def run_both(folder, **overrides):
    params = load_params(None, {**SMALL, **overrides})
    cache_parquet.main(params, cache=folder / "cache", metrics=folder / "corpus.json")
    paths = {name: folder / name for name in ("cache", "tokenizer", "tokens")}
    tokenize.main(params, **paths, metrics=folder / "tokenizer.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def run_stage(stage, folder, params, *paths):
    """The stage as a process in `folder`, as DVC starts it."""
    (folder / "params.yaml").write_text(json.dumps(params))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", "-m", f"stages.{stage}", *map(str, paths)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    imported = {line.split("|")[-1].strip() for line in lines if line.startswith("import time:")}
    return done.returncode, [line for line in lines if not line.startswith("import time:")], imported


def test_both_stages_write_their_artifacts_and_metrics_twice_the_same(tmp_path):
    first = run_both(tmp_path / "a")
    assert run_both(tmp_path / "b", **{"training.dataset_batch_size": 77}) == first
    corpus, tokens = json.loads(first["corpus.json"]), json.loads(first["tokenizer.json"])
    assert corpus["documents"] == 800
    assert corpus["tasks"]["xnli"] == {"dev": 60, "test": 60, "train": 60}
    assert tokens["vocab_size"] == 700
    assert tokens["packing_efficiency"] >= 0.98
    assert tokens["rows"]["valid"] >= 1
    assert tokens["chars_per_token"] > 2
    rows = TokenRows.open(tmp_path / "a" / "tokens", "train")
    assert (rows.num_rows, rows.max_length, rows.vocab_size) == (tokens["rows"]["train"], 64, 700)
    assert Tokenizer.load(tmp_path / "a" / "tokenizer").decode(rows.take(np.array([0]))[0])


def test_another_seed_gives_another_sample(tmp_path):
    first, second = (run_both(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert first["cache/corpus-00000.parquet"] != second["cache/corpus-00000.parquet"]


def test_bad_input_is_one_message_and_exit_code_2_and_keeps_earlier_outputs(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes("bien\nni\xf1o\n".encode("latin-1"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "old").write_text("x")
    params = {"data": {"source": "text", "path": "in", "sample_pairs": 60, "sample_eval_pairs": 60}}
    code, errors, _ = run_stage("cache_parquet", tmp_path, params, "--cache", "cache", "--metrics", "m.json")
    assert code == 2
    assert len(errors) == 1
    assert "in/a.txt: line 2: byte 0xf1 at byte offset 7 is not UTF-8" in errors[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "in", "params.yaml"]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["old"]


@pytest.mark.parametrize("stage", ["cache_parquet", "tokenize"])
def test_the_data_stages_load_no_heavy_library(tmp_path, stage):
    params = {
        "data": {"sample_sentences": 200, "sample_pairs": 60, "sample_eval_pairs": 60},
        "model": {"vocab_size": 400},
    }
    paths = {"cache_parquet": ("cache",), "tokenize": ("cache", "tokenizer", "tokens")}[stage]
    if stage == "tokenize":
        cache_parquet.main(load_params(None, SMALL), cache=tmp_path / "cache", metrics=tmp_path / "m.json")
    arguments = [word for name in paths for word in (f"--{name}", tmp_path / name)]
    code, errors, imported = run_stage(stage, tmp_path, params, *arguments, "--metrics", tmp_path / "m.json")
    assert (code, errors) == (0, [])
    assert "numpy" in imported
    heavy = {"torch", "pandas", "datasets", "sklearn", "scipy", "matplotlib", "transformers", "dvc"}
    assert not heavy & {name.partition(".")[0] for name in imported}
