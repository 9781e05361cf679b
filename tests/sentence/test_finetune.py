"""Siamese fine-tuning on a toy set: it learns, repeats itself bit for bit, resumes, and writes what was trained."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from frankenstein.artifact import MANIFEST, digests, open_folder
from frankenstein.cli import main
from frankenstein.errors import FrankensteinError, NotBuiltYetError
from frankenstein.model.storage import load_encoder, save_encoder
from frankenstein.quantization.artifact import load_latent
from frankenstein.quantization.convert import bitnet_config
from frankenstein.sentence import finetune as module
from frankenstein.sentence.encoder import SentenceEncoder, SentenceSettings
from frankenstein.sentence.files import file_data
from frankenstein.sentence.finetune import finetune, finetune_sbert
from frankenstein.sentence.objective import RECIPES, SiameseObjective, rank_correlation
from frankenstein.sentence.options import SbertOptions
from frankenstein.sentence.pairs import PairSet
from frankenstein.text.tokenizer import Tokenizer
from frankenstein.training.emergency import batch_tensors
from frankenstein.training.guard import TrainingStopped
from frankenstein.training.loop import Trainer
from frankenstein.training.replay import replay
from tests.sentence.world import World, toy_pairs

OPTIONS = SbertOptions(
    pooling="mean",
    tasks=("stsb",),
    epochs=4,
    batch_size=16,
    max_length=32,
    lr=2e-3,
    dev_pairs=40,
    checkpoint_every_n_steps=7,
)


def run(world: World, root: Path, **changes: Any) -> dict[str, Any]:
    arguments = {
        "quantized": world.quantized,
        "parent_encoder": world.full,
        "cache": world.cache,
        "options": OPTIONS,
        "seed": 3,
        "threads": 1,
        "out": root / "sbert",
        "metrics": root / "sbert.json",
        "curve": root / "sbert.csv",
        "resume": root / "resume",
    }
    return finetune_sbert(**{**arguments, **changes})


@pytest.fixture(scope="module")
def tuned(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tuned")
    run(world, root)
    return root


def objective(world: World) -> SiameseObjective:
    words = Tokenizer.load(world.tokenizer)
    pairs = toy_pairs(24, 1)
    train = PairSet(replace(pairs, targets=pairs.targets / 5), words, 32)
    return SiameseObjective(train, (len(train),), {"toy": train}, replace(OPTIONS, batch_size=8), seed=1)


def test_the_loss_of_a_batch_is_that_of_its_pairs_encoded_one_by_one(world: World) -> None:
    toy = objective(world)
    batch = toy.batch(2, 0)
    model = SentenceEncoder.load(world.full)
    loss, _ = toy.loss(model.model, batch)
    chosen, pairs = toy.order.indices(2), toy_pairs(24, 1)
    cosines = model.similarity([pairs.first[i] for i in chosen], [pairs.second[i] for i in chosen])
    assert loss.item() == pytest.approx(float(np.mean((cosines - pairs.targets[chosen] / 5) ** 2)), abs=1e-6)


def test_the_development_score_is_the_spearman_correlation_of_the_cosines(world: World) -> None:
    toy, pairs, model = objective(world), toy_pairs(24, 1), SentenceEncoder.load(world.full)
    with torch.no_grad():
        values = toy.validate(model.model)
    cosines = model.similarity(pairs.first, pairs.second)
    assert values["spearman_toy"] == pytest.approx(scipy.stats.spearmanr(cosines, pairs.targets).statistic)
    assert values["spearman"] == values["spearman_toy"]
    assert values["loss"] == pytest.approx(float(np.mean((cosines - pairs.targets / 5) ** 2)), abs=1e-6)


def test_rank_correlation_averages_ties_and_is_zero_for_a_constant() -> None:
    values, targets = np.array([0.1, 0.5, 0.5, 0.9, -1.0]), np.array([0, 1, 1, 1, 0])
    assert rank_correlation(values, targets) == pytest.approx(scipy.stats.spearmanr(values, targets).statistic)
    assert rank_correlation(np.ones(5), targets) == 0.0


def test_fine_tuning_lowers_the_loss_and_raises_the_development_score_of_both_models(world: World, tuned: Path) -> None:
    report = json.loads((tuned / "sbert.json").read_text())
    rows = list(csv.DictReader((tuned / "sbert.csv").read_text().splitlines()))
    untrained = objective(world)
    for name in ("ternary", "full"):
        losses = [float(row["loss"]) for row in rows if row["model"] == name]
        scores = [float(row["dev_spearman"]) for row in rows if row["model"] == name and row["dev_spearman"]]
        assert len(losses) == report[name]["steps"] == 4 * 16
        assert np.mean(losses[-16:]) < 0.7 * np.mean(losses[:16])
        assert len(scores) == 4 and scores[-1] > 0.65
        assert report[name]["pairs"] == 256
        assert report[name]["dev_spearman"] == {
            "stsb": pytest.approx(scores[-1], abs=1e-4),
            "mean": pytest.approx(scores[-1], abs=1e-4),
        }
    with torch.no_grad():
        before = untrained.validate(load_encoder(world.full))
    assert before["spearman"] < 0.5


def test_the_written_models_are_the_trained_ones_and_carry_their_sentence_settings(tuned: Path) -> None:
    report = json.loads((tuned / "sbert.json").read_text())
    pairs = toy_pairs(40, len("stsbdev"))
    for name, kind in (("ternary", "packed_encoder"), ("full", "encoder")):
        model = SentenceEncoder.load(tuned / "sbert" / name)
        assert model.kind == kind
        assert model.settings == SentenceSettings("mean", True, 32)
        score = scipy.stats.spearmanr(model.similarity(pairs.first, pairs.second), pairs.targets).statistic
        assert score == pytest.approx(report[name]["dev_spearman"]["stsb"], abs=0.02)


def test_two_runs_give_the_same_bytes(world: World, tuned: Path, tmp_path: Path) -> None:
    run(world, tmp_path)
    assert digests(tmp_path / "sbert") == digests(tuned / "sbert")
    assert (tmp_path / "sbert.json").read_bytes() == (tuned / "sbert.json").read_bytes()
    assert (tmp_path / "sbert.csv").read_bytes() == (tuned / "sbert.csv").read_bytes()


def test_a_run_that_was_broken_off_in_either_model_ends_with_the_same_bytes(
    world: World, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, steps = Trainer._step, 0

    def breaking(trainer: Trainer, *rest: Any) -> None:
        nonlocal steps
        steps += 1
        if steps in (17, 90):  # in the first model after its second checkpoint, then in the second model
            raise KeyboardInterrupt
        original(trainer, *rest)

    monkeypatch.setattr(Trainer, "_step", breaking)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(world, tmp_path)
        assert not (tmp_path / "sbert").exists()
    run(world, tmp_path)
    assert steps <= 64 * 2 + 2 * 7  # what stood in checkpoints was not trained again
    assert digests(tmp_path / "sbert") == digests(tuned / "sbert")
    assert (tmp_path / "sbert.csv").read_bytes() == (tuned / "sbert.csv").read_bytes()
    assert not list((tmp_path / "resume").glob("*"))


def test_a_parent_that_is_ternary_itself_has_no_full_precision_twin(world: World, tmp_path: Path) -> None:
    report = run(world, tmp_path, parent_encoder=world.quantized / "latent", options=replace(OPTIONS, epochs=1))
    assert list(report) == ["ternary"]
    assert sorted(p.name for p in (tmp_path / "sbert").iterdir()) == [MANIFEST, "ternary"]


def test_without_a_ternary_encoder_only_the_full_one_is_tuned(world: World, tmp_path: Path) -> None:
    (tmp_path / "quantized" / "full").mkdir(parents=True)
    report = run(world, tmp_path, quantized=tmp_path / "quantized", options=replace(OPTIONS, epochs=1))
    assert list(report) == ["full"]
    with pytest.raises(FrankensteinError, match="found no latent/ folder; expected the ternary encoder"):
        run(world, tmp_path, quantized=tmp_path / "quantized", parent_encoder=world.quantized / "latent")


def test_the_ternary_model_trained_is_the_one_that_is_packed(world: World, tmp_path: Path) -> None:
    saved = {}
    original = module.pack

    def keep(encoder: Any, folder: Path, **options: Any) -> None:
        words = Tokenizer.load(world.tokenizer).model_bytes
        save_encoder(encoder, tmp_path / "kept", tokenizer=words, max_length=32, bitnet=bitnet_config(encoder))
        saved.update(options)
        original(encoder, folder, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "pack", keep)
        run(world, tmp_path, options=replace(OPTIONS, epochs=1))
    ids = torch.tensor([[2, 40, 41, 42, 3]])
    packed = SentenceEncoder.load(tmp_path / "sbert" / "ternary").model
    with torch.no_grad():
        assert torch.equal(packed(ids), load_latent(tmp_path / "kept")(ids))
    assert saved["embeddings"] == "int8"


def write_pairs_csv(path: Path, rows: list[tuple[str, str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("sentence1", "sentence2", "score"), *rows])


def test_any_encoder_can_be_tuned_on_a_file_of_pairs(world: World, tmp_path: Path) -> None:
    pairs = toy_pairs(64, 1)
    rows = list(zip(pairs.first, pairs.second, pairs.targets / 5, strict=True))
    write_pairs_csv(tmp_path / "train.csv", rows[:48])
    write_pairs_csv(tmp_path / "dev.csv", rows[48:])
    data = file_data(tmp_path / "train.csv", tmp_path / "dev.csv")
    common = {
        "data": data,
        "options": replace(OPTIONS, epochs=1),
        "seed": 0,
        "threads": 1,
        "resume": tmp_path / "resume",
    }
    for folder, kind in ((world.full, "encoder"), (world.quantized / "latent", "packed_encoder")):
        summary = finetune(encoder=folder, out=tmp_path / kind, **common)
        assert (summary["steps"], summary["pairs"], list(summary["dev_spearman"])) == (3, 48, ["dev", "mean"])
        assert open_folder(tmp_path / kind)["kind"] == kind
    assert "dev_loss" not in finetune(
        encoder=world.full, out=tmp_path / "again", **{**common, "data": file_data(tmp_path / "train.csv")}
    )
    with pytest.raises(FrankensteinError, match="is a packed encoder, which cannot be trained"):
        finetune(encoder=world.quantized / "packed", out=tmp_path / "x", **common)


def test_a_bad_step_names_its_pairs_and_can_be_run_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def begin_step(self: SiameseObjective, model: Any, now: int) -> None:
        if now == 9:
            with torch.no_grad():
                model.blocks[1].ffn.up.norm.weight.fill_(3e38)  # finite, its product is not

    monkeypatch.setattr(SiameseObjective, "begin_step", begin_step)
    with pytest.raises(TrainingStopped, match=r"First not finite: blocks\.1\.ffn\."):
        run(world, tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "sbert").exists()
    [folder] = (tmp_path / "resume").glob("*/emergency-*")
    notes = json.loads((folder / "notes.json").read_text())
    [rows] = notes["rows"]
    assert len(rows) == 16 and set(rows[0]) == {"row", "id", "first", "second", "target"}
    stored, toy = toy_pairs(256, len("stsbtrain")), rows[3]
    assert toy["first"] == stored.first[toy["row"]] and toy["target"] == stored.targets[toy["row"]] / 5
    result = replay(folder, RECIPES)
    assert result.seen.first_bad == notes["second_run"]["first_bad"]
    assert result.seen.gradients_not_finite == notes["second_run"]["gradients_not_finite"]
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert notes["step"] == 13  # the tenth, and three retries
    assert shown.startswith("sbert ternary: step 13 of 64, on ")
    assert f"training rows: {', '.join(str(row['row']) for row in rows)}; texts in notes.json" in shown


def test_the_loss_that_is_built_again_is_the_loss_of_the_step(world: World) -> None:
    toy, model = objective(world), load_encoder(world.full)
    batch = toy.batch(1, 0)
    recipe = RECIPES[toy.recipe()["kind"]]
    again = recipe.loss({"objective": json.loads(json.dumps(toy.recipe()))}, model, torch.device("cpu"))
    assert torch.equal(again(model, recipe.batch(batch_tensors(batch)))[0], toy.loss(model, batch)[0])


def test_a_loss_that_is_not_built_stops_before_any_step(world: World) -> None:
    toy = objective(world)
    with pytest.raises(NotBuiltYetError, match="'mnrl' is not built yet"):
        SiameseObjective(toy.train, (len(toy.train),), {}, replace(OPTIONS, loss="mnrl"), seed=1)
