"""The whole pipeline through DVC, at toy size, in a clean copy of the project: what a user does after cloning."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent.parent
TOY = """\
seed: 3
threads: 1
data:
  source: sample
  path: data/sample
  tasks_path: data/sample
  validation_fraction: 0.1
  sample_sentences: 600
  sample_pairs: 90
  sample_eval_pairs: 60
tokenizer:
  model_type: unigram
model:
  vocab_size: 450
  hidden_size: 32
  num_layers: 2
  num_heads: 2
  retention_heads: 2
  ffn_hidden_size: 64
  layer_pattern:
    - retnet
    - standard_attn
training:
  max_samples: 1000000
  dataset_batch_size: 256
  num_workers: 0
  cache_dir: data/.hub
  local_parquet_dir:
  prefer_local_cache: true
  stream_local_parquet: true
  max_length: 64
  batch_size: 8
  scheduler_total_steps: 60
  eval_every_n_steps: 30
  checkpoint_every_n_steps: 10
quantize:
  steps: 8
sbert:
  epochs: 1
  batch_size: 32
evaluate:
  bootstrap_samples: 100
export:
  rows: 50
"""


def copy_project(target: Path) -> Path:
    """The files git tracks or would track, as a repository of their own with one commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in sorted(set(filter(None, listed)) - {"dvc.lock"}):
        if not name.startswith("reports/") and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / "params.yaml").write_text(TOY, encoding="utf-8")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "toy"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *command], cwd=target, check=True)
    return target


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def lock(folder: Path) -> dict:
    return YAML(typ="safe").load((folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]


def outs(folder: Path) -> dict[str, str]:
    return {o["path"]: o["md5"] for stage in lock(folder).values() for o in stage.get("outs", [])}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which `dvc repro` has run."""
    folder = copy_project(tmp_path_factory.mktemp("pipeline") / "first")
    run = dvc(folder, "repro")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return folder


def test_every_stage_leaves_its_artifact_and_git_stays_clean_of_them(done: Path) -> None:
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    assert set(lock(done)) == set(stages)
    for path in outs(done):
        assert (done / path).exists(), path
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=done, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[-1].split("/")[0] for line in status.splitlines()} <= {"reports", "dvc.lock"}


def test_a_second_repro_does_nothing(done: Path) -> None:
    before = (done / "dvc.lock").read_bytes()
    run = dvc(done, "repro")
    assert run.returncode == 0
    assert "Data and pipelines are up to date" in run.stdout + run.stderr
    assert (done / "dvc.lock").read_bytes() == before


def test_metrics_are_numbers_with_intervals_and_the_report_needs_no_network(done: Path) -> None:
    shown = json.loads(dvc(done, "metrics", "show", "--json").stdout)
    files = shown[""]["data"]
    assert {Path(f).stem for f in files} >= {"corpus", "tokenizer", "pretrain", "quantize", "sbert", "embed", "probe"}
    embed = json.loads((done / "reports/metrics/embed.json").read_text())
    low, high = embed["stsb"]["ternary"]["ci95"]
    assert low <= high
    report = (done / "reports/report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert 'src="http' not in report
    assert 'href="http' not in report
    assert "<link" not in report
    assert "url(http" not in report


def test_a_bad_configuration_stops_before_anything_is_deleted(done: Path) -> None:
    good = (done / "params.yaml").read_text()
    try:
        (done / "params.yaml").write_text(good.replace("hidden_size: 32", "hidden_size: 31"))
        run = dvc(done, "repro")
        assert run.returncode != 0
        assert "params.yaml:17:3: model.num_heads" in run.stdout + run.stderr
        for path in outs(done):
            assert (done / path).exists() or path == "reports/params.ok", path
    finally:
        (done / "params.yaml").write_text(good)
    assert dvc(done, "repro").returncode == 0


def test_a_killed_pretraining_continues_to_the_same_bits(done: Path, tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "second")
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "pretrain"],
        cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not list((folder / "data/.resume").glob("*/rolling-*")) and time.monotonic() < deadline:
        assert process.poll() is None, "pretraining ended before it could be killed"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "data/encoder").exists()
    run = dvc(folder, "repro")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "resumed at step" in run.stdout + run.stderr
    assert outs(folder) == outs(done)
    assert lock(folder) == lock(done)
    assert not list((folder / "data").glob(".resume/*"))
