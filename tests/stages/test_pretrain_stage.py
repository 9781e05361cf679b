"""Pretraining on a small real corpus: artifacts, reports, determinism, resume."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frankenstein.artifact import new_folder
from frankenstein.errors import FrankensteinError
from frankenstein.model.options import ModelOptions
from frankenstein.model.storage import load_encoder, read_config
from frankenstein.params import Params
from frankenstein.text.options import TokenizerOptions
from frankenstein.text.sample.generate import corpus
from frankenstein.text.tokenizer import Tokenizer
from frankenstein.training.options import TrainingOptions
from frankenstein.training.pretrain import fingerprint
from stages.pretrain import main

STEPS, LENGTH = 40, 32


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and token rows of a few hundred sample texts."""
    folder = tmp_path_factory.mktemp("text")
    texts = list(corpus(400, seed=0))
    words = Tokenizer.train(texts, folder / "tokenizer", options=TokenizerOptions(), vocab_size=400, seed=0)
    stream = [i for ids in words.encode_batch(texts) for i in (*ids, words.sep_id)]
    rows = np.array(stream[: len(stream) // (LENGTH - 1) * (LENGTH - 1)]).reshape(-1, LENGTH - 1)
    rows = np.column_stack([np.full(len(rows), words.cls_id), rows]).astype("<u2")
    splits = {"train": rows[:-16], "valid": rows[-16:]}
    shards = {s: {"rows": len(r), "shards": [{"file": f"{s}-00000.bin", "rows": len(r)}]} for s, r in splits.items()}
    config = {"max_length": LENGTH, "vocab_size": words.vocab_size, "dtype": "uint16", "splits": shards}
    with new_folder(folder / "tokens", "tokens", config) as temporary:
        for split, part in splits.items():
            (temporary / f"{split}-00000.bin").write_bytes(part.tobytes())
    return folder


def params(folder: Path, *, model: dict[str, Any] | None = None, **training: Any) -> Params:
    values = {
        "batch_size": 8, "max_length": LENGTH, "scheduler_total_steps": STEPS, "eval_every_n_steps": 20,
        "checkpoint_every_n_steps": 10, "csv_log_path": str(folder / "logs" / "pretrain.csv"), **training,
    }  # fmt: skip
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "retention_heads": 2, "ffn_hidden_size": 48}
    options = ModelOptions(vocab_size=400, **{**shape, **(model or {})})
    return Params(threads=1, model=options, training=TrainingOptions(**values))


def run(experiment: Params, text: Path, folder: Path) -> None:
    paths = {"encoder": "encoder", "metrics": "pretrain.json", "curve": "pretrain.csv", "resume": "resume"}
    main(experiment, tokens=text / "tokens", tokenizer=text / "tokenizer", **{k: folder / v for k, v in paths.items()})


def test_the_stage_writes_a_trained_encoder_and_its_reports(text: Path, tmp_path: Path) -> None:
    rate = dataclasses.replace(TrainingOptions().optimizer, parameters={"adamw-lr": 3e-3})
    run(params(tmp_path, optimizer=rate), text, tmp_path)
    encoder, config = load_encoder(tmp_path / "encoder"), read_config(tmp_path / "encoder")
    assert config["max_length"] == LENGTH and config["bitnet"] is None and config["sentence"] is None
    assert (tmp_path / "encoder" / "tokenizer.model").read_bytes() == Tokenizer.load(text / "tokenizer").model_bytes

    metrics = json.loads((tmp_path / "pretrain.json").read_text())
    assert metrics["parameters"] == encoder.parameter_count()
    assert metrics["ended_by"] == "steps"
    assert metrics["steps"] == STEPS and metrics["tokens"] == STEPS * 8 * LENGTH
    assert metrics["valid_perplexity"] == pytest.approx(math.exp(metrics["valid_loss"]), rel=1e-5)
    assert metrics["valid_loss"] < math.log(400) - 0.5 and metrics["valid_accuracy"] > 0.02

    with (tmp_path / "pretrain.csv").open(newline="") as stream:
        curve = list(csv.DictReader(stream))
    assert list(curve[0]) == ["step", "loss", "valid_loss", "learning_rate"]
    assert [row["step"] for row in curve if row["valid_loss"]] == ["20", "40"] and len(curve) == STEPS
    assert not (tmp_path / "resume").exists()
    assert len((tmp_path / "logs" / "pretrain.csv").read_text().splitlines()) == STEPS + 1


def test_a_token_budget_ends_the_stage_with_a_whole_result(text: Path, tmp_path: Path) -> None:
    run(params(tmp_path, max_tokens=10 * 8 * LENGTH - 1), text, tmp_path)
    metrics = json.loads((tmp_path / "pretrain.json").read_text())
    assert (metrics["ended_by"], metrics["steps"], metrics["tokens"]) == ("max_tokens", 10, 10 * 8 * LENGTH)
    assert metrics["valid_loss"] < math.log(400) + 1 and load_encoder(tmp_path / "encoder").parameter_count()
    with (tmp_path / "pretrain.csv").open(newline="") as stream:
        last = list(csv.DictReader(stream))[-1]
    assert last["step"] == "10" and last["valid_loss"]
    assert not (tmp_path / "resume").exists()


def test_an_interrupted_run_resumes_to_the_same_bytes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frankenstein.training.mlm import MlmObjective

    straight, crashed = tmp_path / "straight", tmp_path / "crashed"
    options = {"model": {"dropout": 0.1}, "gradient_accumulation_steps": 2, "scheduler_total_steps": 16}
    log = {"csv_log_path": str(tmp_path / "log.csv")}
    run(params(tmp_path, **options, **log), text, straight)
    batch = MlmObjective.batch

    def interrupted(self: MlmObjective, step: int, micro: int) -> Any:
        if step == 13:
            raise KeyboardInterrupt
        return batch(self, step, micro)

    monkeypatch.setattr(MlmObjective, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(params(tmp_path, **options, **log), text, crashed)
    assert sorted(p.name for p in crashed.iterdir()) == ["resume"]
    monkeypatch.undo()
    run(params(tmp_path, **options, **log), text, crashed)
    files = sorted(p.relative_to(straight) for p in straight.rglob("*") if p.is_file())
    assert len(files) == 6
    for file in files:
        assert (straight / file).read_bytes() == (crashed / file).read_bytes(), file


def test_a_ternary_encoder_is_trained_as_one(text: Path, tmp_path: Path) -> None:
    run(params(tmp_path, model={"use_bitnet": True}, scheduler_total_steps=4), text, tmp_path)
    assert read_config(tmp_path / "encoder")["bitnet"] == {"scale": "channel", "norm": True}
    assert json.loads((tmp_path / "pretrain.json").read_text())["valid_loss"] < math.log(400) + 1


def test_inputs_that_do_not_fit_together_are_named_before_anything_is_written(text: Path, tmp_path: Path) -> None:
    with pytest.raises(FrankensteinError, match=r"tokens: rows of 32 tokens; training\.max_length is 64"):
        run(params(tmp_path, max_length=64), text, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_follows_options_and_inputs(text: Path) -> None:
    base = fingerprint({"seed": 0}, text / "tokens")
    assert base == fingerprint({"seed": 0}, text / "tokens") and len(base) == 64
    assert len({base, fingerprint({"seed": 1}, text / "tokens"), fingerprint({"seed": 0}, text / "tokenizer")}) == 3
