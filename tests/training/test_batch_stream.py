import threading
import time

import pytest
import torch

from frankenstein.sentence.pairs import PairBatch
from frankenstein.training.batches import batch_stream, pinned
from frankenstein.training.mlm import MlmBatch


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_order_does_not_depend_on_the_workers(workers: int) -> None:
    def make(step: int, micro: int) -> tuple[int, int]:
        time.sleep(0.002 * ((step * 7 + micro) % 3))  # later batches are often ready first
        return step, micro

    stream = batch_stream(make, first_step=2, steps=7, per_step=2, workers=workers)
    assert list(stream) == [(s, m) for s in range(2, 7) for m in range(2)]


def test_an_error_in_a_worker_reaches_the_loop() -> None:
    def make(step: int, micro: int) -> int:
        if step == 3:
            raise ValueError("broken row")
        return step

    stream = batch_stream(make, first_step=0, steps=9, per_step=1, workers=2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="broken row"):
        next(stream)


def test_closing_the_stream_ends_the_threads() -> None:
    stream = batch_stream(lambda step, micro: step, first_step=0, steps=1000, per_step=1, workers=2)
    next(stream)
    stream.close()
    time.sleep(0.05)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_a_pinned_batch_has_every_tensor_pinned_and_the_rest_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 100)
    ids, positions = torch.arange(6).view(2, 3), torch.tensor([1, 4])
    batch = pinned(MlmBatch(ids, None, positions, positions, tokens=6))
    assert batch.inputs.tolist() == [[100, 101, 102], [103, 104, 105]] and batch.positions.tolist() == [101, 104]
    assert batch.real is None and batch.tokens == 6
    pairs = pinned(PairBatch(ids, ids > 2, torch.zeros(1)))
    assert isinstance(pairs, PairBatch) and pairs.targets.tolist() == [100.0]
    assert pinned({"x": 1}) == {"x": 1}
