import math

import pytest
import torch

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


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("bias", [None, 0.0, torch.linspace(-3, 1, LENGTH, dtype=torch.float64)[:, None]])
def test_one_buffer_form_equals_dense_with_gradients(padded: bool, causal: bool, bias: torch.Tensor | None) -> None:
    mask = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [6]]) if padded else None
    results = []
    for function in (sigmoid_attention, sigmoid_dense):
        inputs = random_qkv()
        o = function(*inputs, key_padding_mask=mask, causal=causal, bias=bias)
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


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
