import math

import pytest
import torch

from benchmarks.machine import saved_bytes
from frankenstein.mixers import sigmoid_attn as module
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.sigmoid_attn import SigmoidAttention, sigmoid_attention, sigmoid_dense

LENGTH = 13


def random_qkv() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(2, LENGTH, 3, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def layer(*, causal: bool = False, **options: object) -> SigmoidAttention:
    torch.manual_seed(0)
    context = MixerContext(8, 2, 2, 0.0, causal, 64, 0, None)
    return SigmoidAttention(context, SigmoidAttention.Options(**options)).double()


BIASES = {
    "log T": None,
    "number": 0.0,
    "a query": torch.linspace(-3, 1, LENGTH, dtype=torch.float64)[:, None],
    "an example": torch.tensor([-1.0, 0.5], dtype=torch.float64)[:, None, None, None],
    "a pair": torch.linspace(-3, 3, 3 * LENGTH**2, dtype=torch.float64).reshape(3, LENGTH, LENGTH),
}


@pytest.mark.parametrize("tile", [1, 3 * LENGTH * 5, 3 * LENGTH**2, 1 << 18], ids=lambda n: f"tile{n}")
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_tiles_equal_dense_with_gradients(
    monkeypatch: pytest.MonkeyPatch, tile: int, padded: bool, causal: bool, bias: float | torch.Tensor | None
) -> None:
    monkeypatch.setattr(module, "_TILE", tile)
    monkeypatch.setattr(module, "_ROWS", 2)
    mask = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [6]]) if padded else None
    results = []
    for function in (sigmoid_attention, sigmoid_dense):
        inputs = random_qkv()
        o = function(*inputs, key_padding_mask=mask, causal=causal, bias=bias)
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_a_bias_that_learns_gets_its_gradient() -> None:
    found = []
    for function in (sigmoid_attention, sigmoid_dense):
        bias = torch.zeros(3, 1, 1, dtype=torch.float64, requires_grad=True)
        found.append(torch.autograd.grad(function(*random_qkv(), bias=bias).sin().sum(), bias)[0])
    torch.testing.assert_close(*found)


def test_bfloat16_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE", 1)
    wide = [x.detach().bfloat16().double().requires_grad_() for x in random_qkv()]
    half = [x.detach().bfloat16().requires_grad_() for x in wide]
    outputs = [sigmoid_attention(*inputs, bias=-1.0) for inputs in (half, wide)]
    found = [[o, *torch.autograd.grad(o.sum(), x)] for o, x in zip(outputs, (half, wide), strict=True)]
    for narrow, exact in zip(*found, strict=True):
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.double(), exact, rtol=2e-2, atol=2e-2)


def test_what_the_backward_pass_needs_grows_with_the_row_and_not_with_its_square() -> None:
    def saved(length: int) -> int:
        qkv = [torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(3)]
        return saved_bytes(lambda: sigmoid_attention(*qkv))

    assert saved(1024) == 4 * saved(256)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the tracer itself
def test_a_compiled_call_equals_the_plain_one() -> None:
    inputs = random_qkv()
    compiled = torch.compile(sigmoid_attention, backend="aot_eager", fullgraph=True)
    found = [[o, *torch.autograd.grad(o.sin().sum(), inputs)] for o in (sigmoid_attention(*inputs), compiled(*inputs))]
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain)


def test_weights_of_equal_logits_are_known_and_not_normalized() -> None:
    q, k, v = random_qkv()
    o = sigmoid_attention(torch.zeros_like(q), k, v)
    torch.testing.assert_close(o, (v.sum(1, keepdim=True) / (LENGTH + 1)).expand_as(o))  # sigmoid(-log T) = 1 / (T + 1)
    doubled = sigmoid_attention(torch.zeros_like(q), torch.cat([k, k], 1)[:, :LENGTH], v, bias=0.0)
    torch.testing.assert_close(doubled, (v.sum(1, keepdim=True) / 2).expand_as(o))


def test_the_bias_counts_the_tokens_that_a_query_sees() -> None:
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.arange(6)[None] < torch.tensor([[6], [4]])
    assert layer()._logit_bias(x, None) is None
    counted = layer()._logit_bias(x, mask)
    torch.testing.assert_close(counted.flatten(), -torch.tensor([6.0, 4.0], dtype=torch.float64).log())
    causal = layer(causal=True)._logit_bias(x, mask)
    torch.testing.assert_close(causal.flatten(), -torch.arange(1, 7, dtype=torch.float64).log())
    assert layer(bias="max_length")._logit_bias(x, mask) == -math.log(64)


def test_stabilizers_do_what_they_say() -> None:
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    plain = layer()(x)
    scaled = layer(stabilizer="layer_scale", layer_scale_init=0.25)(x)
    torch.testing.assert_close(scaled, plain * 0.25)
    normed = layer(stabilizer="hybrid_norm")(x)
    torch.testing.assert_close(normed, plain / (plain.square().mean(-1, keepdim=True) + 1e-6).sqrt())
