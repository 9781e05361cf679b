"""Float16 with a scaled loss: overflow halves the scale and is no instability; the state survives a crash."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frankenstein.optimizers.adamw import AdamW
from frankenstein.training.accumulation import accumulate
from frankenstein.training.guard import TrainingStopped
from frankenstein.training.precision import Precision
from tests.training.training_standin import Regression, build_net, trainer

HALF = {"amp": True, "amp_dtype": "float16"}
CPU = torch.device("cpu")
RARELY = {"checkpoint_every_n_steps": 200, "eval_every_n_steps": 200}


class Overflowing(Regression):
    """Adds a term of value (almost) 0 whose gradient overflows float16 at scales above `limit`."""

    def __init__(self, limit: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.factor = 65504.0 / limit

    def loss(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, values = super().loss(model, batch)
        bias = model.last.bias
        return loss + self.factor * (bias.half().float() - bias).sum(), values


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_scale_is_halved_until_nothing_overflows_and_no_retry_is_used(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    run = trainer(tmp_path, Overflowing(10_000.0), log, dropout=0.0, steps=8, max_nan_retries=0, **HALF)
    history = run.run()
    assert [float(row["scaler_scale"]) for row in rows(log)] == [65536, 32768, 16384, *[8192] * 5]
    assert run.state.unstable == 0 and not list((tmp_path / "f").glob("emergency-*"))
    assert [row["grad_norm"] is None for row in history] == [True] * 3 + [False] * 5
    assert {state["step"].item() for state in run.optimizer.state.values()} == {5}  # three steps were left out
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_overflow_at_a_scale_of_one_and_below_is_unstable(tmp_path: Path) -> None:
    run = trainer(tmp_path, Overflowing(0.1), tmp_path / "log.csv", steps=40, max_nan_retries=2, **HALF)
    with pytest.raises(TrainingStopped, match="stopped at step 19: "):
        run.run()
    assert [float(row["scaler_scale"]) for row in rows(tmp_path / "log.csv")] == [2.0 ** (16 - i) for i in range(19)]


def test_a_loss_that_is_not_finite_is_unstable_whatever_the_scale(tmp_path: Path) -> None:
    run = trainer(tmp_path, Regression(bad_steps=(3,)), steps=8, **HALF)
    run.run()
    assert run.state.unstable == 1


@pytest.mark.parametrize("sizes", [(8,), (3, 9)])
def test_gradients_are_those_of_float32_to_the_precision_of_float16(sizes: tuple[int, ...]) -> None:
    data = Regression(sizes)
    batches = [data.batch(0, micro) for micro in range(len(sizes))]
    found = []
    for dtype, amp in (("bfloat16", False), ("float16", True)):
        net = build_net(0.0)
        precision = Precision(CPU, amp=amp, dtype=dtype, scale=1024.0)
        values = accumulate(net, iter(batches), data.loss, precision, single=len(sizes) == 1)
        extra = precision.unscale(AdamW(net.parameters()))
        assert (extra == {}) == (not amp)
        found.append([values["loss"], *(p.grad for p in net.parameters())])
    for exact, half in zip(*found, strict=True):
        torch.testing.assert_close(half, exact, rtol=5e-3, atol=2e-3)


def test_the_number_of_terms_does_not_use_up_the_range_of_float16() -> None:
    class Many(Regression):
        def loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            loss, values = super().loss(model, batch)
            return loss, {**values, "terms": values["terms"] * 10_000}

    net, data = build_net(0.0), Many((8, 8))
    precision = Precision(CPU, amp=True, dtype="float16", scale=64.0)
    accumulate(net, iter([data.batch(0, 0), data.batch(0, 1)]), data.loss, precision, single=False)
    assert not precision.unscale(AdamW(net.parameters()))["overflow"]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_it_trains_as_float32_does(tmp_path: Path) -> None:
    exact, half = (
        trainer(tmp_path / str(i), dropout=0.0, steps=200, **RARELY, **extra) for i, extra in enumerate(({}, HALF))
    )
    a, b = exact.run(), half.run()
    assert b[-1]["valid_loss"] == pytest.approx(a[-1]["valid_loss"], rel=0.1) and b[-1]["loss"] < 0.1 * b[0]["loss"]


@pytest.mark.parametrize("interval", [1, 7])
def test_a_killed_run_resumes_to_the_same_bits_scale_included(tmp_path: Path, interval: int) -> None:
    class Killed(Overflowing):
        def batch(self, step: int, micro: int) -> dict:
            if step == 8:
                raise KeyboardInterrupt
            return super().batch(step, micro)

    settings = {**HALF, "nan_check_interval": interval}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", Killed(500.0), tmp_path / "b.csv", **settings).run()
    straight, resumed = (
        trainer(tmp_path / name, Overflowing(500.0), tmp_path / f"{name}.csv", **settings) for name in "ab"
    )
    assert straight.run() == resumed.run() and straight.state == resumed.state
    assert resumed.precision.scaler.state_dict() == straight.precision.scaler.state_dict()
    scales = [[row["scaler_scale"] for row in rows(tmp_path / f"{name}.csv")] for name in "ab"]
    assert scales[0] == scales[1] and float(scales[0][-1]) < 512
    for p, q in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_scale_grows_after_enough_good_steps() -> None:
    precision, parameter = Precision(CPU, amp=True, dtype="float16", scale=4.0), nn.Parameter(torch.ones(1))
    precision.scaler.set_growth_interval(2)
    optimizer, used = AdamW([parameter]), []
    for _ in range(4):
        parameter.grad = None
        precision.backward(parameter.sum())
        values = precision.unscale(optimizer)
        used.append(values["scaler_scale"].item())
        assert parameter.grad is not None and parameter.grad.item() == 1.0 and not values["overflow"]
    assert used == [4, 4, 8, 8]


def test_a_column_of_the_log_is_1_without_a_scale(tmp_path: Path) -> None:
    trainer(tmp_path, log=tmp_path / "log.csv", steps=2, amp=True).run()
    assert [row["scaler_scale"] for row in rows(tmp_path / "log.csv")] == ["1", "1"]
