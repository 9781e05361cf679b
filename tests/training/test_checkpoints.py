import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from frankenstein.artifact import new_folder, open_folder
from frankenstein.optimizers.adamw import AdamW
from frankenstein.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    Dump,
    RunState,
    Trained,
    generator_states,
    restore_generators,
    seed_generators,
)
from frankenstein.training.guard import TrainingStopped
from tests.training.training_standin import Regression, build_net, no_file_over, trainer


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def final(folder: Path, **settings: object) -> dict[str, torch.Tensor]:
    run = trainer(folder, **settings)  # type: ignore[arg-type]
    run.run()
    return run.model.state_dict()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Interrupted(Regression):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def batch(self, step: int, micro: int) -> dict:
        if step == self.at:
            raise KeyboardInterrupt
        return super().batch(step, micro)


def interrupt(folder: Path, at: int, **settings: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, Interrupted(at), **settings).run()  # type: ignore[arg-type]


def test_only_the_newest_rolling_and_the_best_are_kept(tmp_path: Path) -> None:
    final(tmp_path, max_rolling_checkpoints=2, num_best_checkpoints=2, eval_every_n_steps=4)
    kept = names(tmp_path / "f")
    assert kept[2:] == ["rolling-00000015", "rolling-00000020"]
    run = trainer(tmp_path / "again", num_best_checkpoints=2, eval_every_n_steps=4)
    valid = {row["step"]: row["valid_loss"] for row in run.run() if "valid_loss" in row}
    assert list(valid) == [4, 8, 12, 16, 20]
    best = sorted(valid, key=lambda s: valid[s])[:2]
    assert kept[:2] == sorted(f"best-{s:08d}" for s in best)
    assert run.state.best == [[valid[s], s] for s in best]


def test_a_checkpoint_is_an_artifact_that_loads_without_pickle(tmp_path: Path) -> None:
    final(tmp_path)
    folder = tmp_path / "f" / "rolling-00000020"
    assert open_folder(folder, "checkpoint")["step"] == 20
    assert names(folder) == ["config.json", "manifest.json", "model.safetensors", "state.pt"]
    assert set(torch.load(folder / "state.pt", weights_only=True)) == {"optimizer", "scaler", "generators"}


@pytest.mark.parametrize("at", [3, 5, 12, 19])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, at: int) -> None:
    interrupt(tmp_path / "b", at)
    run = trainer(tmp_path / "b")
    straight = trainer(tmp_path / "a")
    assert run.run() == straight.run()
    assert run.state == straight.state
    assert_equal(run.model.state_dict(), straight.model.state_dict())


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    want = final(tmp_path / "a")
    interrupt(tmp_path / "b", 13)
    weights = tmp_path / "b" / "f" / "rolling-00000010" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with caplog.at_level(logging.INFO):
        got = final(tmp_path / "b")
    messages = [r.getMessage() for r in caplog.records]
    assert any("checkpoint skipped" in m and "rolling-00000010" in m and "sha256 differs" in m for m in messages)
    assert "test: resumed at step 5 of 20" in messages
    assert_equal(got, want)


def test_what_an_interrupted_write_left_behind_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "f" / ".rolling-00000005.abc"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    final(tmp_path)
    assert not leftover.exists()


def test_finish_removes_the_checkpoints_and_an_empty_parent(tmp_path: Path) -> None:
    run = trainer(tmp_path / "resume")
    run.run()
    run.finish()
    assert not (tmp_path / "resume").exists()


def test_a_finished_run_that_was_not_cleared_trains_no_further(tmp_path: Path) -> None:
    want = final(tmp_path)
    run = trainer(tmp_path, Interrupted(0))
    assert run.run()[-1]["step"] == 20
    assert_equal(run.model.state_dict(), want)


def test_all_generators_are_restored(tmp_path: Path) -> None:
    seed_generators(5)

    def draw() -> tuple[float, ...]:
        gauss = np.random.standard_normal()  # noqa: NPY002  the global generator is what is tested
        return random.random(), random.gauss(0, 1), gauss, *torch.rand(2).tolist()

    draw()
    torch.save(generator_states(), tmp_path / "state.pt")
    want = draw()
    restore_generators(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == want


def test_tied_weights_are_saved_and_restored(tmp_path: Path) -> None:
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    net["b"].weight = net["a"].weight
    store = Checkpoints(tmp_path / "f", rolling=1)
    optimizer = AdamW(net.parameters())
    trained = Trained(net, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    store.save("rolling", trained, RunState(step=1))
    want = net["a"].weight.detach().clone()
    with torch.no_grad():
        net["a"].weight.zero_()
    restored = store.restore(trained)
    assert restored == RunState(step=1)
    assert torch.equal(net["b"].weight, want) and net["a"].weight is net["b"].weight


def test_only_one_emergency_checkpoint_is_kept(tmp_path: Path) -> None:
    store, net = Checkpoints(tmp_path / "f", rolling=2), build_net()
    trained = Trained(net, AdamW(net.parameters()), torch.amp.GradScaler("cpu", enabled=False))
    dump = Dump(generator_states(), {"why": "test"}, lambda folder: None)
    for step in (1, 2):
        store.save("emergency", trained, RunState(step=step), dump)
    assert names(tmp_path / "f") == ["emergency-00000002"]


def test_the_end_of_every_epoch_keeps_a_checkpoint(tmp_path: Path) -> None:
    final(tmp_path / "a", steps_per_epoch=6, nan_check_interval=20)
    epochs = [n for n in names(tmp_path / "a" / "f") if n.startswith("epoch")]
    assert epochs == ["epoch-00000006", "epoch-00000012", "epoch-00000018"]
    history = open_folder(tmp_path / "a" / "f" / epochs[1], "checkpoint")["history"]
    assert [row["step"] for row in history] == list(range(1, 13))
    final(tmp_path / "b", steps_per_epoch=6, max_epoch_checkpoints=2)
    assert [n for n in names(tmp_path / "b" / "f") if n.startswith("epoch")] == epochs[1:]
    final(tmp_path / "c", steps_per_epoch=6, max_epoch_checkpoints=0)
    assert not [n for n in names(tmp_path / "c" / "f") if n.startswith("epoch")]


def test_epoch_checkpoints_do_not_change_the_bits_and_a_run_resumes_past_them(tmp_path: Path) -> None:
    want = final(tmp_path / "a")
    interrupt(tmp_path / "b", 14, steps_per_epoch=4)
    assert_equal(final(tmp_path / "b", steps_per_epoch=4), want)
    assert len([n for n in names(tmp_path / "b" / "f") if n.startswith("epoch")]) == 5


@pytest.mark.parametrize("size", [100, 400, 1000, 2500])  # in the weights, in the optimizer's state, in the config
def test_a_checkpoint_that_cannot_be_written_is_one_message_and_leaves_the_others_intact(
    tmp_path: Path, size: int
) -> None:
    want = final(tmp_path / "a")
    interrupt(tmp_path / "b", 12)
    before = {p: p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    with no_file_over(size), pytest.raises(CheckpointError) as caught:
        final(tmp_path / "b")
    message, folder = str(caught.value), tmp_path / "b" / "f"
    assert message == (
        f"checkpoint {folder / 'rolling-00000015'} could not be written: File too large. The earlier ones are intact. "
        "Make room and run again: training goes on from rolling-00000010"
    )
    assert {p: p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()} == before
    assert not list(folder.glob(".*"))
    assert_equal(final(tmp_path / "b"), want)


def test_a_first_checkpoint_that_cannot_be_written_says_where_training_starts_again(tmp_path: Path) -> None:
    with no_file_over(100), pytest.raises(CheckpointError, match="run again: training starts from the beginning"):
        final(tmp_path)


def test_a_full_disk_does_not_hide_why_training_stopped(tmp_path: Path) -> None:
    with no_file_over(100), pytest.raises(TrainingStopped) as caught:
        trainer(tmp_path, Regression(bad_steps=(2,)), max_nan_retries=0).run()
    assert "stopped at step 3: loss nan" in str(caught.value)
    assert "emergency-00000002 could not be written: File too large" in str(caught.value)


def test_a_checkpoint_with_bad_numbers_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    want = final(tmp_path / "a")
    interrupt(tmp_path / "b", 13)
    folder = tmp_path / "b" / "f" / "rolling-00000010"
    weights = load_file(folder / "model.safetensors")
    weights["last.bias"].fill_(torch.nan)
    with new_folder(folder, "checkpoint") as temporary:
        for name in ("config.json", "state.pt"):
            (temporary / name).write_bytes((folder / name).read_bytes())
        save_file(weights, temporary / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        got = final(tmp_path / "b")
    assert any(
        "checkpoint skipped" in r.getMessage() and "not finite: last.bias" in r.getMessage() for r in caplog.records
    )
    assert_equal(got, want)
