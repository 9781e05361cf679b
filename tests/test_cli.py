"""frankenstein-transformer: what it prints, what it refuses, exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

from frankenstein.cli import COMING, main

ROOT = Path(__file__).resolve().parent.parent


def test_help_lists_what_is_and_what_is_coming(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in ("validate", "train", "replay", "quantize", "sbert-train", "sbert-infer", *COMING):
        assert name in text


@pytest.mark.parametrize(
    "arguments", [["deploy"], ["infer", "x"], ["web-server", "--port", "1"], ["sbert-infer", "search", "--k", "3"]]
)
def test_a_coming_command_refuses_whatever_it_is_given(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "not built yet" in capsys.readouterr().err


def test_validate_says_valid_or_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(ROOT / "params.yaml")]) == 0
    assert capsys.readouterr().out.endswith("params.yaml: valid\n")
    (tmp_path / "bad.yaml").write_text("model:\n  hiden_size: 3\n")
    assert main(["validate", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml:2:3: model.hiden_size: unknown key" in capsys.readouterr().err
    assert main(["validate", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_validate_names_an_input_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.yaml").write_text(f"data:\n  source: parquet\n  path: {tmp_path}/none\n  tasks_path: {tmp_path}\n")
    assert main(["validate", str(tmp_path / "p.yaml")]) == 2
    error = capsys.readouterr().err
    assert "data.path" in error
    assert "does not exist" in error
    assert "'xnli' has no folder" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "x", "--set", "model.hidden_size"], "expected KEY=VALUE"),
        (["train", "--out", "x", "--set", "model.hidden_size=[1"], "the value is not valid YAML"),
        (["train", "--out", "x", "--set", "model.hidden_sise=8"], "override: model.hidden_sise: unknown key"),
        (["quantize", "--encoder", "none", "--tokens", "none", "--out", "x"], "none: no such folder"),
        (["replay", "none"], "none: no such folder"),
        (["replay", "none", "--plugin", "no_such_plugin"], "--plugin no_such_plugin: cannot be imported"),
        (["sbert-infer", "similarity", "--model", "none", "a", "b"], "none: no such folder"),
        (["sbert-train", "--encoder", "none", "--pairs", "none.csv", "--out", "x"], "none.csv"),
    ],
)
def test_a_mistake_ends_in_one_message_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["validate", "params.yaml", "--fast"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


def test_help_and_validate_import_no_torch() -> None:
    code = (
        "import sys\nfrom frankenstein.cli import main\n"
        "main(['validate', 'params.yaml'])\n"
        "assert not {'torch', 'pandas', 'datasets', 'sklearn'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


TINY = {
    "threads": 1, "data.sample_sentences": 300, "data.sample_pairs": 60, "data.sample_eval_pairs": 60,
    "model.vocab_size": 400, "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2,
    "model.retention_heads": 2, "model.ffn_hidden_size": 32, "training.max_length": 32, "training.batch_size": 8,
    "training.scheduler_total_steps": 4, "quantize.steps": 3, "sbert.epochs": 1,
}  # fmt: skip


def test_train_quantize_fine_tune_and_use_an_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [x for key, value in TINY.items() for x in ("--set", f"{key}={value}")]
    assert main(["train", "--out", "run", *tiny]) == 0
    assert (
        main(["quantize", "--encoder", "run/encoder", "--tokens", "run/tokens", "--out", "run/quantized", *tiny]) == 0
    )
    latent = ["sbert-train", "--encoder", "run/quantized/latent", "--cache", "run/cache", "--out", "run/sbert"]
    assert main([*latent, *tiny]) == 0
    capsys.readouterr()
    assert main(["sbert-infer", "similarity", "--model", "run/sbert", "El perro duerme.", "El perro duerme."]) == 0
    assert float(capsys.readouterr().out) == pytest.approx(1.0, abs=1e-3)
    Path("texts.txt").write_text("uno\ndos\ntres\n", encoding="utf-8")
    assert main(["sbert-infer", "encode", "--model", "run/sbert", "--input", "texts.txt", "--out", "run/vectors"]) == 0
    assert "3 sentences" in capsys.readouterr().out
    assert (tmp_path / "run/vectors/embeddings.npy").is_file()
