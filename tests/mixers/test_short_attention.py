"""Attention of short rows in bfloat16 against float64, and where it is taken."""

import pytest
import torch
from torch import Tensor

from frankenstein.mixers import short_attention, standard_attn
from frankenstein.mixers.standard_attn import softmax_attention, softmax_dense

HAS_TILES = bool(torch.cpu.get_capabilities().get("amx_bf16"))


def draw(queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, queries, 3, 8), (2, keys, 3, 8), (2, keys, 3, 10)]
    return [(2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]


def run(inputs: list[Tensor], o: Tensor) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape).to(o.dtype)
    return [o, *torch.autograd.grad(o, inputs, upstream)]


@pytest.fixture(params=[1, 1 << 18])
def heads_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_attention, "_SCORES", request.param)


@pytest.mark.usefixtures("heads_at_once")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(17, 17), (5, 9)])
def test_outputs_and_gradients_are_those_of_float64_to_the_rounding_of_bfloat16(
    queries: int, keys: int, masked: bool
) -> None:
    inputs = draw(queries, keys, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    allowed = None
    if masked:
        allowed = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.6
        allowed[..., 0] = True
    o = short_attention.attend(*(x.transpose(1, 2) for x in inputs), allowed).transpose(1, 2)
    logits = torch.einsum("bihk,bjhk->bhij", *exact[:2]) * 8**-0.5
    logits = logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))
    expected = run(exact, torch.einsum("bhij,bjhv->bihv", logits.softmax(-1), exact[2]))
    for got, wanted in zip(run(inputs, o), expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).abs().max() < 0.012 * wanted.abs().max()


def test_a_query_that_sees_no_key_gets_zero_and_finite_gradients() -> None:
    inputs = draw(4, 4, torch.bfloat16)
    allowed = torch.ones(2, 1, 1, 4, dtype=torch.bool)
    allowed[1] = False
    o, *grads = run(inputs, short_attention.attend(*(x.transpose(1, 2) for x in inputs), allowed))
    assert not o[1].any() and o[0].any()
    assert all(bool(g.isfinite().all()) and not g[1].any() and bool(g[0].any()) for g in grads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax_attention_may_take_it_under_autocast(
    causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where this machine would not: the arithmetic is the same everywhere."""
    monkeypatch.setattr(short_attention, "_TILES", True)
    taken = []
    attend = short_attention.attend
    monkeypatch.setattr(standard_attn.short_attention, "attend", lambda *a: taken.append(1) or attend(*a))
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]]) if masked else None
    inputs = draw(12, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o = softmax_attention(*inputs, key_padding_mask=mask, causal=causal)
    assert taken and o.dtype == torch.bfloat16
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = run(exact, softmax_dense(*exact, key_padding_mask=mask, causal=causal))
    for got, wanted in zip(run(inputs, o), expected, strict=True):
        assert (got.double() - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore")  # of TorchDynamo itself
@pytest.mark.parametrize("masked", [False, True])
def test_a_compiler_takes_it_whole(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_attention, "_TILES", True)
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]]) if masked else None
    inputs = draw(12, 12, torch.float32)

    def attention(*x: Tensor) -> Tensor:
        return softmax_attention(*x, key_padding_mask=mask)

    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = run(inputs, compiled(*inputs)), run(inputs, attention(*inputs))
    assert got[0].dtype == torch.bfloat16
    for found, wanted in zip(got, expected, strict=True):
        assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_it_is_taken_for_short_rows_in_training_on_such_a_cpu_only() -> None:
    half, long = (torch.zeros(1, 1, n, 8, dtype=torch.bfloat16) for n in (128, short_attention.LONGEST + 1))
    assert short_attention.pays(half, half) == HAS_TILES
    assert not short_attention.pays(half, long) and not short_attention.pays(half.float(), half.float())
    with torch.no_grad():
        assert not short_attention.pays(half, half)
    with torch.autocast("cpu", torch.bfloat16):
        assert short_attention.pays(half.float(), half.float()) == HAS_TILES
        assert not short_attention.pays(half.double(), half.double())
