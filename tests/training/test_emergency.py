"""A bad step leaves a folder that says what went wrong, and that runs the step again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.cli import main
from frankenstein.errors import FrankensteinError
from frankenstein.quantization.options import QuantizeOptions
from frankenstein.runtime import best_device
from frankenstein.training.emergency import batch_tensors
from frankenstein.training.guard import TrainingStopped
from frankenstein.training.mlm import MlmBatch, MlmObjective
from frankenstein.training.options import TrainingOptions
from frankenstein.training.recovery import Recovery
from frankenstein.training.replay import replay
from frankenstein.training.row_origins import RowOrigins
from frankenstein.training.ternary import quantize_encoder
from tests.training.tiny_language import pretrain_tiny, write_language
from tests.training.training_standin import Regression, trainer


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    write_language(folder)
    return folder


@pytest.fixture(autouse=True)
def torch_settings() -> Any:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def overflow(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From `step` on a feed-forward weight is finite, and so large that its product is not."""

    def begin_step(self: MlmObjective, model: Any, now: int) -> None:
        if now == step:
            with torch.no_grad():
                model.blocks[1].ffn.up.weight.fill_(3e38)

    monkeypatch.setattr(MlmObjective, "begin_step", begin_step)


def stopped(out: Path) -> Path:
    [folder] = (out / "resume").glob("*/emergency-*")
    return folder


def test_a_stop_names_the_module_the_rows_and_how_to_run_the_step_again(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overflow(monkeypatch, 6)
    with pytest.raises(TrainingStopped) as caught:
        pretrain_tiny(language, tmp_path, model={"dropout": 0.1}, max_nan_retries=2, gradient_accumulation_steps=2)
    folder = stopped(tmp_path)
    assert folder.name == "emergency-00000008"
    message = str(caught.value)
    assert message.startswith("pretrain: training stopped at step 9: loss nan, gradient norm nan")
    assert "First not finite: blocks.1.ffn.up (Linear), output of call 1: " in message
    assert message.endswith(f"notes.json: {folder}; run it again: frankenstein-transformer replay {folder}")

    notes = json.loads((folder / "notes.json").read_text())
    first = notes["second_run"]["first_bad"]
    assert (first["module"], first["input_finite"], first["weights_finite"]) == ("blocks.1.ffn.up", True, True)
    assert notes["step"] == 9 and notes["weights_of_step"] == 8 and notes["values"]["loss"] == "nan"
    assert notes["not_finite"] == [] and notes["model"]["layer_pattern"] == ["retnet", "standard_attn"]
    assert set(notes["learning_rates"]) == {"embeddings", "norms", "retnet", "attention", "other"}
    assert notes["batch"]["0.inputs"].startswith("(4, 8) torch.int64, ")
    assert [[len(micro), set(micro[0])] for micro in notes["rows"]] == [
        [4, {"row", "file", "row_in_file", "documents", "text"}]
    ] * 2
    words = " ".join(row["text"] for micro in notes["rows"] for row in micro).split()
    assert {"ana", "canta"} <= set(words)

    monkeypatch.undo()
    result = replay(folder)
    assert result.seen.first_bad == first  # dropout draws included
    assert result.seen.gradients_not_finite == notes["second_run"]["gradients_not_finite"]
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == [
        f"pretrain: step 9 of 12, on {best_device()}",
        "recorded: loss nan, gradient norm nan",
        "now: loss nan, gradient norm nan",
    ]
    assert shown[3].startswith("first not finite: blocks.1.ffn.up (Linear), output of call 1: ")


def test_the_batch_in_the_folder_is_the_batch_of_the_step(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, MlmBatch] = {}
    batch = MlmObjective.batch

    def remember(self: MlmObjective, step: int, micro: int) -> MlmBatch:
        seen[step] = batch(self, step, micro)
        return seen[step]

    monkeypatch.setattr(MlmObjective, "batch", remember)
    overflow(monkeypatch, 5)
    with pytest.raises(TrainingStopped):
        pretrain_tiny(language, tmp_path, max_nan_retries=0)
    saved = load_file(stopped(tmp_path) / "batch.safetensors")
    for name, tensor in batch_tensors(seen[5]).items():
        assert torch.equal(saved[f"0.{name}"], tensor), name


def test_a_replay_of_a_healthy_step_gives_its_loss_and_norm_to_the_bit(language: Path, tmp_path: Path) -> None:
    """Exploding gradients: nothing is NaN, so that the numbers can be compared. Clipping off, a low threshold."""
    settings = {"grad_clip_max_norm": 0.0, "inf_post_clip_threshold": 0.01, "max_nan_retries": 0}
    with pytest.raises(TrainingStopped, match="First not finite: nothing that is not finite"):
        pretrain_tiny(language, tmp_path, model={"dropout": 0.2}, use_amp=True, **settings)
    folder = stopped(tmp_path)
    notes = json.loads((folder / "notes.json").read_text())
    recorded = notes["values"]
    assert (notes["second_run"]["loss"], notes["second_run"]["gradient_norm"]) == (
        recorded["loss"],
        recorded["grad_norm"],
    )
    result = replay(folder)
    assert result.seen.finite
    assert result.seen.loss == recorded["loss"]
    assert result.seen.gradient_norm == recorded["grad_norm"]


def test_the_ternary_finish_can_be_replayed(language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain_tiny(language, tmp_path)
    options = TrainingOptions(
        batch_size=4, max_length=8, grad_clip_max_norm=0.0, inf_post_clip_threshold=0.01, max_nan_retries=0,
        csv_log_path=str(tmp_path / "log.csv"), max_tokens=1,
    )  # fmt: skip
    with pytest.raises(TrainingStopped, match="quantize: training stopped at step 1"):
        quantize_encoder(
            seed=0, threads=1, options=QuantizeOptions(steps=8), training_options=options,
            encoder=tmp_path / "encoder", tokens=language / "tokens", out=tmp_path / "q", resume=tmp_path / "resume",
            metrics=tmp_path / "q.json", curve=tmp_path / "q.csv",
        )  # fmt: skip
    folder = stopped(tmp_path)
    recorded = json.loads((folder / "notes.json").read_text())["values"]
    result = replay(folder)
    assert (result.seen.loss, result.seen.gradient_norm) == (recorded["loss"], recorded["grad_norm"])


def test_every_bad_step_leaves_its_folder_and_the_newest_stays_after_the_end(tmp_path: Path) -> None:
    run = trainer(tmp_path, Regression(bad_steps=(3, 8)))
    run.run()
    run.finish()
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["emergency-00000008"]
    notes = json.loads((tmp_path / "f" / "emergency-00000008" / "notes.json").read_text())
    assert notes["step"] == 9 and notes["second_run"]["first_bad"] == {"module": None, "what": "loss"}
    assert notes["replay"] is None


def test_looking_at_a_bad_step_changes_nothing_that_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, blind = (trainer(tmp_path / name, Regression(bad_steps=(3,))) for name in "ab")
    history = looked.run()
    monkeypatch.setattr(Recovery, "_dump", lambda *_: "")
    assert blind.run() == history
    for p, q in zip(looked.model.parameters(), blind.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_good_step_after_the_bad_one_still_moves_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read together: the bad step is looked at while the gradients of a later one wait to be used."""
    settings = {"nan_check_interval": 5, "checkpoint_every_n_steps": 20}
    looked, blind = (trainer(tmp_path / name, Regression(bad_steps=(3,)), **settings) for name in "ab")
    history = looked.run()
    monkeypatch.setattr(Recovery, "_dump", lambda *_: "")
    assert blind.run() == history
    for p, q in zip(looked.model.parameters(), blind.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_corpus_that_is_gone_does_not_cost_the_folder(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(language, copy)
    overflow(monkeypatch, 2)
    describe = RowOrigins.describe

    def gone(self: RowOrigins, rows: Any) -> Any:
        shutil.rmtree(copy / "tokens", ignore_errors=True)
        return describe(self, rows)

    monkeypatch.setattr(RowOrigins, "describe", gone)
    with pytest.raises(TrainingStopped, match=r"First not finite: blocks\.1\.ffn\.up"):
        pretrain_tiny(copy, tmp_path, max_nan_retries=0)
    notes = json.loads((stopped(tmp_path) / "notes.json").read_text())
    assert notes["rows"].startswith("unknown: ") and "tokens: no such folder" in notes["rows"]
    assert main(["replay", str(stopped(tmp_path))]) == 0


def test_a_reading_of_many_steps_tells_which_was_the_first_bad_one(tmp_path: Path) -> None:
    run = trainer(tmp_path, Regression(bad_steps=(6, 8)), nan_check_interval=10, checkpoint_every_n_steps=20)
    run.run()
    notes = json.loads((tmp_path / "f" / "emergency-00000009" / "notes.json").read_text())
    assert (notes["step"], notes["weights_of_step"], run.state.unstable) == (7, 9, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: trainer(folder.parent.parent).run(), "has no batch.safetensors; expected an emergency"),
        (lambda folder: trainer(folder.parent.parent, Regression(bad_steps=(20,)), steps=21).run(), "of 'test' cannot"),
    ],
)
def test_a_folder_that_cannot_be_replayed_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    folder = tmp_path / "f" / "rolling-00000020"
    make(folder)
    if "cannot" in message:
        folder = folder.with_name("emergency-00000020")
    with pytest.raises(FrankensteinError, match=message):
        replay(folder)


def test_a_batch_of_any_nesting_becomes_named_tensors() -> None:
    batch = {"a": [torch.ones(2), {"b": 3}], "c": "text", "d": None, "e": True}
    found = batch_tensors(batch)
    assert {k: v.tolist() for k, v in found.items()} == {"a.0": [1, 1], "a.1.b": 3, "e": True}
    whole = torch.arange(4)
    copies = batch_tensors((whole, whole[:2], whole.numpy()))
    assert len({tensor.data_ptr() for tensor in (whole, *copies.values())}) == 4  # a file cannot share memory
