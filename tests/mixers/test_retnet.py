import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.mixers import retnet
from frankenstein.mixers.base import MIXERS, MixerContext
from frankenstein.mixers.retnet import (
    MultiScaleRetention,
    bidirectional_retention,
    bidirectional_retention_recurrent,
    retention,
    retention_decay,
    retention_recurrent,
)

F64 = torch.float64


def random_inputs(length: int, *, state: bool = False) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = [(2, length, 3, 4), (2, length, 3, 4), (2, length, 3, 5)] + [(2, 3, 4, 5)] * state
    return [torch.randn(*s, generator=g, dtype=F64, requires_grad=True) for s in shapes]


def log_gamma() -> torch.Tensor:
    return torch.tensor([-0.03, -0.5, -3.0], dtype=F64)


def assert_same(results: list[tuple[torch.Tensor, ...]]) -> None:
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 7, 16, 33])
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 128])
def test_chunked_equals_recurrent_with_states_and_gradients(length: int, chunk_size: int) -> None:
    results = []
    for function, extra in ((retention, {"chunk_size": chunk_size}), (retention_recurrent, {})):
        q, k, v, state = random_inputs(length, state=True)
        o, final = function(q, k, v, log_gamma(), initial_state=state, output_final_state=True, scale=0.7, **extra)
        grads = torch.autograd.grad(o.sin().sum() + final.cos().sum(), (q, k, v, state))
        results.append((o, final, *grads))
    assert_same(results)


def test_without_states_the_final_state_is_none_and_two_halves_make_a_whole() -> None:
    q, k, v = random_inputs(21)
    whole, nothing = retention(q, k, v, log_gamma(), chunk_size=8)
    assert nothing is None
    first, state = retention(q[:, :10], k[:, :10], v[:, :10], log_gamma(), output_final_state=True)
    second, _ = retention(q[:, 10:], k[:, 10:], v[:, 10:], log_gamma(), initial_state=state, chunk_size=4)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("length", [1, 9, 33])
@pytest.mark.parametrize("chunk_size", [1, 4, 128])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_bidirectional_equals_the_rule_with_gradients(length: int, chunk_size: int, padded: bool) -> None:
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(1, length - 5)]]) if padded else None
    results = []
    for function, extra in (
        (bidirectional_retention, {"chunk_size": chunk_size}),
        (bidirectional_retention_recurrent, {}),
    ):
        inputs = random_inputs(length)
        o = function(*inputs, log_gamma(), mask=mask, **extra)
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
    assert_same(results)


@pytest.mark.parametrize("chunk_size", [3, 128])
def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient(chunk_size: int) -> None:
    q, k, v = random_inputs(12)
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    o = bidirectional_retention(q, k, v, log_gamma(), mask=mask, chunk_size=chunk_size)
    alone = bidirectional_retention(q[1:, :7], k[1:, :7], v[1:, :7], log_gamma(), chunk_size=chunk_size)
    torch.testing.assert_close(o[1:, :7], alone)
    assert o[1, 7:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), (q, k, v)):
        assert grad[1, 7:].abs().max() == 0


def test_reversing_the_input_reverses_the_output() -> None:
    q, k, v = random_inputs(17)
    o = bidirectional_retention(q, k, v, log_gamma(), chunk_size=5)
    flipped = bidirectional_retention(q.flip(1), k.flip(1), v.flip(1), log_gamma(), chunk_size=5)
    torch.testing.assert_close(flipped.flip(1), o)


def test_without_decay_it_is_linear_attention() -> None:
    q, k, v = random_inputs(19)
    zero = torch.zeros(3, dtype=F64)
    weights = torch.einsum("bihk,bjhk->bhij", q, k) * 4**-0.5
    both = torch.einsum("bhij,bjhv->bihv", weights, v)
    torch.testing.assert_close(bidirectional_retention(q, k, v, zero, chunk_size=6), both)
    causal = torch.einsum("bhij,bjhv->bihv", weights.tril(), v)
    torch.testing.assert_close(retention(q, k, v, zero, chunk_size=6)[0], causal)


def test_with_total_decay_every_token_is_alone() -> None:
    q, k, v = random_inputs(19)
    o = bidirectional_retention(q, k, v, torch.full((3,), -900.0, dtype=F64), chunk_size=6)
    torch.testing.assert_close(o, (q * k).sum(-1, keepdim=True) * 4**-0.5 * v)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_strong_decay_over_many_steps_stays_finite_and_right(dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype).requires_grad_() for x in random_inputs(130)]
    strong = torch.full((3,), -3.0, dtype=dtype)
    o = bidirectional_retention(*inputs, strong, chunk_size=64)
    torch.testing.assert_close(o, bidirectional_retention_recurrent(*inputs, strong), rtol=1e-4, atol=1e-5)
    for grad in torch.autograd.grad(o.sum() + retention(*inputs, strong)[0].sum(), inputs):
        assert torch.isfinite(grad).all()


def test_decays_of_eight_heads_are_the_published_ones() -> None:
    official = retention_decay(8)
    assert official.tolist() == [1 - 2.0 ** -(5 + h) for h in range(8)]
    assert retention_decay(8, "seed_eq25")[[0, 7]].tolist() == pytest.approx([0.96875, 1 - 2 ** -(5 + 49 / 8)])
    assert retention_decay(8, kind="linspace")[[0, 7]].tolist() == pytest.approx([1 - 1 / 32, 1 - 1 / 512])
    assert official.dtype == F64
    with pytest.raises(FrankensteinError, match="unknown retention decay 'fast'; known: official, seed_eq25, linspace"):
        retention_decay(8, "fast")


def test_the_layer_follows_the_authors_equation() -> None:
    torch.manual_seed(0)
    context = MixerContext(8, 4, 2, 0.0, False, 16, 0, None)
    layer = MultiScaleRetention(context, MultiScaleRetention.Options(decay="linspace")).double()
    layer.log_gamma = retention_decay(2, "linspace").log()
    x = torch.randn(1, 5, 8, dtype=F64)
    q, k, v, gate = layer.project.linear(x).view(1, 5, 4, 2, 4).unbind(2)
    o = torch.zeros(1, 5, 2, 4, dtype=F64)
    for i in range(5):
        for j in range(5):
            weight = retention_decay(2, "linspace") ** abs(i - j) * (q[0, i] * k[0, j]).sum(-1) / 2
            o[0, i] += weight[:, None] * v[0, j]
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # per head
    expected = layer.out((gate * gate.sigmoid() * o).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_both_registered_names_are_the_same_layer() -> None:
    assert MIXERS["retnet"] is MIXERS["retnet_attn"]


@pytest.mark.parametrize("length", [1, 5, 16, 37])
@pytest.mark.parametrize("with_state", [False, True])
def test_without_a_loop_over_chunks_one_way(length: int, with_state: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    state = torch.randn(2, 3, 4, 4, dtype=torch.float64) if with_state else None
    log_gamma = retnet.retention_decay(3).log()
    got, last = retnet._all_at_once(q, k, v, log_gamma, 0.5, 8, state, keep_state=True)
    expected, final = retnet.retention_recurrent(
        q, k, v, log_gamma, scale=0.5, initial_state=state, output_final_state=True
    )
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(last, final)
    for x, y in zip(
        torch.autograd.grad(got.sin().sum(), (q, k, v)),
        torch.autograd.grad(expected.sin().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("length", [1, 5, 16, 37])
def test_without_a_loop_over_chunks_both_ways(length: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 4, dtype=torch.float64) for _ in range(3))
    log_gamma = retnet.retention_decay(3).log()
    got, last = retnet._all_at_once(q, k, v, log_gamma, 0.5, 8, both_ways=True)
    assert last is None
    torch.testing.assert_close(got, retnet.bidirectional_retention_recurrent(q, k, v, log_gamma, scale=0.5))


def test_without_a_loop_strong_decay_stays_finite() -> None:
    q, k, v = (torch.randn(1, 130, 1, 4) for _ in range(3))
    o, _ = retnet._all_at_once(q, k, v, torch.tensor([-3.0]), 0.5, 16, both_ways=True)
    expected = retnet.bidirectional_retention_recurrent(q, k, v, torch.tensor([-3.0]), scale=0.5)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
