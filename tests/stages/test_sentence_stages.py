"""The stages finetune_sbert and export_embeddings: from the command line to the files they promise."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from frankenstein.artifact import open_folder
from stages import export_embeddings, finetune_sbert
from stages.runner import run
from tests.sentence.world import World, make_world

PARAMS = """
seed: 1
threads: 1
sbert:
  tasks: [stsb, pawsx]
  pooling: cls
  epochs: 1
  batch_size: 48
  max_length: 32
export:
  rows: 20
  precision: float16
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    return make_world(tmp_path / "world")


def call(monkeypatch: pytest.MonkeyPatch, stage: object, **paths: Path) -> None:
    """Run a stage as `python -m stages.<name>` does, and put torch's settings back."""
    flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    monkeypatch.setattr(sys, "argv", ["stage", *flags])
    threads = torch.get_num_threads()
    try:
        run(stage.main)  # type: ignore[attr-defined]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def finetune(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    paths = {"quantized": world.quantized, "encoder": world.full, "cache": world.cache, "sbert": Path("data/sbert")}
    reports = {"metrics": Path("reports/metrics/sbert.json"), "curve": Path("reports/plots/sbert.csv")}
    call(monkeypatch, finetune_sbert, **paths, **reports, resume=Path("data/.resume"))


def test_the_two_stages_make_models_reports_and_embeddings(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune(monkeypatch, world)
    assert open_folder("data/sbert/ternary")["kind"] == "packed_encoder"
    assert open_folder("data/sbert/full")["sentence"] == {"pooling": "cls", "normalize": True, "max_length": 32}
    report = json.loads(Path("reports/metrics/sbert.json").read_text())
    assert sorted(report) == ["full", "ternary"]
    assert report["full"]["steps"] == 7  # 256 and 32 pairs in batches of 48 of one task, once
    assert sorted(report["full"]["dev_spearman"]) == ["mean", "pawsx", "stsb"]
    header, *rows = Path("reports/plots/sbert.csv").read_text().splitlines()
    assert header == "step,model,loss,learning_rate,dev_spearman"
    assert len(rows) == 14
    assert not list(Path("data/.resume").glob("*"))
    call(
        monkeypatch, export_embeddings, sbert=Path("data/sbert"), cache=world.cache, embeddings=Path("data/embeddings")
    )
    vectors = np.load("data/embeddings/embeddings.npy")
    assert (vectors.shape, vectors.dtype) == ((20, 32), np.float16)


def test_a_task_without_training_pairs_ends_in_one_message_and_exit_code_2(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("params.yaml").write_text(PARAMS.replace("pawsx", "inferes"))
    with pytest.raises(SystemExit) as stopped:
        finetune(monkeypatch, world)
    assert stopped.value.code == 2
    assert "'inferes' has no training pairs" in capsys.readouterr().err
    assert not Path("data/sbert").exists()
