"""Frozen numbers: state-spaces/mamba@e9594ce selective_scan_ref in float64, inputs in float32.

`selective_scan.safetensors` is one row; `bidirectional_selective_scan.safetensors` is made of it by
y = f(x) + flip(f(flip x)) - f1(x), with tensors of its own for the reverse direction. Gradients are those of the sum of
w_<output> * <output>.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from frankenstein.mixers import tiled_scan
from frankenstein.mixers.selective_scan import (
    bidirectional_selective_scan,
    bidirectional_selective_scan_recurrent,
    selective_scan,
    selective_scan_recurrent,
)

F64 = torch.float64
ROWS, WIDTH, STATES = 3, 5, 4
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=["default", "one_row", "narrow", "single_tokens"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that hold everything; one row and two chunks; some channels, all rows; chunks of one token."""
    chunk, channels, states = {
        "default": (16, 512, 2**19),
        "one_row": (4, 512, 8 * WIDTH * STATES),
        "narrow": (3, 2, 200 * STATES),
        "single_tokens": (1, 4, 3 * 4 * STATES),
    }[request.param]
    monkeypatch.setattr(tiled_scan, "CHUNK", chunk)
    monkeypatch.setattr(tiled_scan, "TILE_CHANNELS", channels)
    monkeypatch.setattr(tiled_scan, "TILE_STATES", states)


def inputs(length: int, *names: str, dtype: torch.dtype = F64) -> Tensors:
    g = torch.Generator().manual_seed(7)
    tokens, weights = (ROWS, length, WIDTH), (ROWS, length, STATES)
    shapes = {"u": tokens, "delta": tokens, "A": (WIDTH, STATES), "B": weights, "C": weights}
    shapes |= {f"{name}_rev": shapes[name] for name in ("delta", "A", "B", "C")}
    shapes |= {"D": (WIDTH,), "z": tokens, "delta_bias": (WIDTH,)}
    x = {name: torch.randn(shape, generator=g, dtype=F64) for name, shape in shapes.items()}
    x |= {name: -x[name].exp() for name in ("A", "A_rev")}
    return {name: x[name].to(dtype).requires_grad_() for name in ("u", "delta", "A", "B", "C", *names)}


def results(function: Callable[..., object], x: Tensors, **options: object) -> list[torch.Tensor]:
    """Outputs and the gradient of every input."""
    outputs = function(**x, **options)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
    return [*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), list(x.values()))]


def assert_same(fast: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 7, 16, 33, 67])
@pytest.mark.usefixtures("tiles")
def test_tiled_equals_recurrent_with_states_and_gradients(length: int) -> None:
    x = inputs(length, "D", "z", "delta_bias")
    options = {"delta_softplus": True, "return_last_state": True}
    assert_same(results(selective_scan, x, **options), results(selective_scan_recurrent, x, **options))


def test_options_left_out_change_nothing_else() -> None:
    x = inputs(21)
    x["delta"] = x["delta"].detach().abs().requires_grad_()
    assert_same(results(selective_scan, x), results(selective_scan_recurrent, x))
    assert selective_scan(**x)[1] is None


@pytest.mark.parametrize("length", [1, 9, 37])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    "own", [(), ("delta_rev", "A_rev", "B_rev", "C_rev"), ("B_rev",)], ids=["shared", "own", "mixed"]
)
@pytest.mark.usefixtures("tiles")
def test_bidirectional_equals_the_rule_with_gradients(length: int, padded: bool, own: tuple[str, ...]) -> None:
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(1, length - 5)], [1]]) if padded else None
    x = inputs(length, "D", "delta_bias", *own)
    options = {"delta_softplus": True, "mask": mask}
    assert_same(
        results(bidirectional_selective_scan, x, **options),
        results(bidirectional_selective_scan_recurrent, x, **options),
    )


def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient() -> None:
    x = inputs(41, "D", "delta_rev", "B_rev")
    mask = torch.arange(41)[None] < torch.tensor([[41], [19], [1]])
    y, *grads = results(bidirectional_selective_scan, x, delta_softplus=True, mask=mask)
    for row, length in ((1, 19), (2, 1)):
        alone = {k: v if v.ndim < 3 else v[row : row + 1, :length] for k, v in x.items()}
        torch.testing.assert_close(
            y[row : row + 1, :length], bidirectional_selective_scan(**alone, delta_softplus=True)
        )
        assert y[row, length:].abs().max() == 0
        assert all(g[row, length:].abs().max() == 0 for g in grads if g.ndim == 3)


def test_reversing_the_input_reverses_the_output() -> None:
    x = inputs(35, "D")
    flipped = {k: v.flip(1) if v.ndim == 3 else v for k, v in x.items()}
    y = bidirectional_selective_scan(**flipped, delta_softplus=True)
    torch.testing.assert_close(y.flip(1), bidirectional_selective_scan(**x, delta_softplus=True))


def test_one_token_both_ways_is_one_token_one_way() -> None:
    x = inputs(1, "D", "delta_bias")
    both = bidirectional_selective_scan(**x, delta_softplus=True)
    torch.testing.assert_close(both, selective_scan(**x, delta_softplus=True)[0])


def test_with_constant_parameters_it_is_an_explicit_convolution() -> None:
    x = {k: v.detach() for k, v in inputs(40).items()}
    x["delta"] = torch.rand(WIDTH, dtype=F64).expand_as(x["delta"])
    x["B"], x["C"] = x["B"][:, :1].expand_as(x["B"]), x["C"][:, :1].expand_as(x["C"])
    dt, lags = x["delta"][0, 0, :, None], torch.arange(40, dtype=F64)[:, None, None]
    kernel = torch.exp(lags * dt * x["A"]) * dt  # (lag, D, N): the authors' eq. 3b
    kernel = torch.einsum("ldn,bn->bdl", kernel, x["B"][:, 0] * x["C"][:, 0])
    one_way, both = torch.zeros_like(x["u"]), torch.zeros_like(x["u"])
    for t in range(40):
        for s in range(40):
            both[:, t] += kernel[:, :, abs(t - s)] * x["u"][:, s]
            if s <= t:
                one_way[:, t] += kernel[:, :, t - s] * x["u"][:, s]
    torch.testing.assert_close(selective_scan(**x)[0], one_way)
    torch.testing.assert_close(bidirectional_selective_scan(**x), both)


def test_without_decay_it_is_linear_attention_and_with_total_decay_every_token_is_alone() -> None:
    x = {k: v.detach() for k, v in inputs(29).items()}
    x["delta"] = x["delta"].abs()
    weights = torch.einsum("btn,bsn->bts", x["C"], x["B"])
    written = x["delta"] * x["u"]
    nothing = {**x, "A": torch.zeros_like(x["A"])}
    torch.testing.assert_close(selective_scan(**nothing)[0], weights.tril() @ written)
    torch.testing.assert_close(bidirectional_selective_scan(**nothing), weights @ written)
    total = {**x, "A": torch.full_like(x["A"], -1e9)}
    alone = weights.diagonal(dim1=1, dim2=2)[..., None] * written
    torch.testing.assert_close(selective_scan(**total)[0], alone)
    torch.testing.assert_close(bidirectional_selective_scan(**total), alone)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("rate", [-3.0, -300.0])
def test_strong_decay_over_many_steps_stays_finite_and_right(dtype: torch.dtype, rate: float) -> None:
    x = inputs(130, "D", dtype=dtype)
    x["A"] = torch.full_like(x["A"], rate).requires_grad_()
    x["delta"] = torch.ones_like(x["delta"]).requires_grad_()
    for fast, plain in (
        (selective_scan, selective_scan_recurrent),
        (bidirectional_selective_scan, bidirectional_selective_scan_recurrent),
    ):
        for a, b in zip(results(fast, x), results(plain, x), strict=True):
            assert torch.isfinite(a).all()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", ["selective_scan", "bidirectional_selective_scan"])
def test_values_and_gradients_equal_published_code(name: str, dtype: torch.dtype) -> None:
    case = load_file(Path(__file__).parent / f"{name}.safetensors")
    x = {k: v.to(dtype).requires_grad_() for k, v in case.items() if not k.startswith(("expected_", "w_"))}
    if name == "selective_scan":
        got = dict(
            zip(("y", "last_state"), selective_scan(**x, delta_softplus=True, return_last_state=True), strict=True)
        )
    else:
        got = {"o": bidirectional_selective_scan(**x, delta_softplus=True)}
    sum((case[f"w_{k}"].to(dtype) * v).sum() for k, v in got.items()).backward()
    got |= {f"grad_{k}": v.grad for k, v in x.items() if f"expected_grad_{k}" in case}
    assert {f"grad_{k}" for k in ("u", "delta", "B", "C")} < set(got)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    for k, v in got.items():
        assert v.dtype == dtype
        torch.testing.assert_close(v.double(), case[f"expected_{k}"], rtol=tolerance, atol=tolerance)


def test_half_precision_is_computed_in_single_precision() -> None:
    x = inputs(50, "D", dtype=torch.bfloat16)
    single = {k: v.detach().float() for k, v in x.items()}
    y, last = selective_scan(**x, delta_softplus=True, return_last_state=True)
    assert y.dtype == last.dtype == torch.bfloat16
    expected, _ = selective_scan(**single, delta_softplus=True)
    assert torch.equal(y, expected.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan(**single, delta_softplus=True)[0], expected)


def test_what_is_kept_for_the_backward_pass_grows_linearly_and_is_less_than_the_states() -> None:
    kept = {}
    for length in (256, 512):
        sizes: dict[int, int] = {}

        def keep(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[t.data_ptr()] = t.numel()
            return t

        u, w = torch.rand(1, length, 64, requires_grad=True), torch.rand(1, length, 16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            selective_scan(u, u.exp(), -torch.rand(64, 16), w, w)
        kept[length] = sum(sizes.values())
    assert kept[512] < 2.02 * kept[256]
    assert kept[512] < 512 * 64 * 16 / 2


class Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_inside_a_tile_the_operations_grow_with_the_chunks_and_not_with_the_tokens() -> None:
    counts = []
    for length in (1024, 2048):
        x = inputs(length)
        with Counter() as forward:
            y = selective_scan(**x, delta_softplus=True)[0]
        with Counter() as backward:
            y.backward(torch.ones_like(y))
        counts.append((forward.count, backward.count))
    for short, long in zip(*counts, strict=True):
        assert long - short <= 1024 / 16
