"""The C kernel of attention on the keys with the highest scores against FASA's equations in float64."""

import math

import pytest
import torch
from torch import Tensor

from frankenstein.kernels import native, selected_keys
from frankenstein.mixers.fasa import fasa_attention, fasa_dense

pytestmark = pytest.mark.skipif(not native.available(selected_keys.NAME), reason="needs a C compiler")
SHAPES = [  # T, H, K, V, n_tip, n_fac
    (37, 3, 8, 16, 2, 5),
    (70, 2, 10, 6, 3, 1),
    (200, 2, 64, 64, 16, 25),
    (200, 1, 16, 88, 4, 199),
    (900, 2, 32, 24, 8, 300),  # many scores, many parts of the keys
]


def inputs(shape: tuple[int, ...], rows: int = 1) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the dominant chunks."""
    length, heads, keys, values, n_tip, _ = shape
    g = torch.Generator().manual_seed(length)
    made = [torch.randn(rows, length, heads, width, generator=g) for width in (keys, keys, values)]
    return made, torch.stack([torch.randperm(keys // 2, generator=g)[:n_tip] for _ in range(heads)])


def run(tensors: list[Tensor], n_fac: int, channels: Tensor, *, causal: bool = False) -> Tensor:
    """The kernel on the first row."""
    scale = tensors[0].shape[-1] ** -0.5
    return selected_keys.selected_attention(*(x[0] for x in tensors), channels, count=n_fac, causal=causal, scale=scale)


def all_channels(tensors: list[Tensor]) -> Tensor:
    return torch.arange(tensors[0].shape[-1]).repeat(tensors[0].shape[2], 1)


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_follows_the_equations(shape: tuple[int, ...], causal: bool, pairing: str) -> None:
    tensors, dominant = inputs(shape)
    settings = {"n_fac": shape[-1], "causal": causal, "rope_pairing": pairing}
    assert selected_keys.usable(*tensors)
    o, (expected, _) = (
        fasa_attention(*tensors, dominant, **settings),
        fasa_dense(*double(tensors), dominant, **settings),
    )
    torch.testing.assert_close(o.double(), expected, rtol=1e-5, atol=2e-6)


def test_padded_rows_are_computed_as_if_alone() -> None:
    tensors, dominant = inputs(SHAPES[0], rows=3)
    lengths = [37, 21, 3]
    mask = torch.arange(37)[None] < torch.tensor(lengths)[:, None]
    o = fasa_attention(*tensors, dominant, n_fac=5, mask=mask)
    for row, n in enumerate(lengths):
        alone = fasa_attention(*(x[row : row + 1, :n] for x in tensors), dominant, n_fac=5)
        assert torch.equal(o[row, :n], alone[0]) and not o[row, n:].any()


@pytest.mark.parametrize("scores", ["normal", "two values", "one far away", "huge spread", "nearly equal"])
@pytest.mark.parametrize("count", [1, 64, 150, 511])
def test_scores_of_any_shape_choose_the_largest(scores: str, count: int) -> None:
    """One channel chooses: its scores are the keys' first numbers. The values tell which keys were read."""
    length, g = 512, torch.Generator().manual_seed(0)
    first = {
        "normal": torch.randn(length, generator=g),
        "two values": (torch.rand(length, generator=g) < 0.3).float(),
        "one far away": torch.randn(length, generator=g).index_fill(0, torch.tensor(77), 1e6),
        "huge spread": torch.randn(length, generator=g).mul(20).exp(),
        "nearly equal": 1 + torch.randint(0, 3, (length,), generator=g) * 2.0**-23,
    }[scores]
    q, k = torch.zeros(length, 1, 8), torch.zeros(length, 1, 8)
    q[..., 0], k[:, 0, 0] = 1.0, first
    v = torch.eye(length)[:, None]
    o = selected_keys.selected_attention(q, k, v, torch.tensor([[0]]), count=count, causal=False, scale=0.0)
    expected = torch.zeros(length)
    expected[first.sort(descending=True, stable=True).indices[:count]] = 1 / count
    torch.testing.assert_close(o[:, 0], expected.expand(length, -1), rtol=1e-6, atol=1e-9)


def test_logits_far_apart_in_different_parts_of_the_keys_do_not_overflow() -> None:
    tensors, dominant = inputs((900, 1, 32, 24, 8, 500))
    tensors[1][:, 700:] *= 400.0
    o = fasa_attention(*tensors, dominant, n_fac=500)
    expected, _ = fasa_dense(*double(tensors), dominant, n_fac=500)
    torch.testing.assert_close(o.double(), expected, rtol=1e-3, atol=1e-3)  # logits near 1000 in float32


def test_nan_stays_in_the_rows_that_read_it() -> None:
    tensors, _ = inputs(SHAPES[2])
    tensors[0][0, 90] = math.nan
    o = run(tensors, 25, all_channels(tensors))
    assert o[90].isnan().all() and not o[:90].isnan().any() and not o[91:].isnan().any()
    tensors, _ = inputs(SHAPES[2])
    tensors[1][0, 90] = math.nan  # of a key: the highest score of all
    assert run(tensors, 25, all_channels(tensors)).isnan().all()
    causal = run(tensors, 25, all_channels(tensors), causal=True)
    assert not causal[:90].isnan().any() and causal[90:].isnan().all()


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    tensors, dominant = inputs(SHAPES[-1])
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(fasa_attention(*tensors, dominant, n_fac=300))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_half_precision_keeps_its_type() -> None:
    tensors, dominant = inputs(SHAPES[2])
    half = [x.bfloat16() for x in tensors]
    o = fasa_attention(*half, dominant, n_fac=25)
    expected, _ = fasa_dense(*double(half), dominant, n_fac=25)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.double(), expected, rtol=1e-2, atol=1e-2)


def test_it_leaves_gradients_and_float64_to_torch() -> None:
    tensors, dominant = inputs(SHAPES[0])
    assert not selected_keys.usable(*double(tensors))
    leaves = [x.requires_grad_() for x in tensors]
    assert not selected_keys.usable(*leaves)
    grads = torch.autograd.grad(fasa_attention(*leaves, dominant, n_fac=5).sum(), leaves)
    assert all(g.abs().sum() > 0 for g in grads)
    with torch.no_grad():
        assert selected_keys.usable(*leaves)
