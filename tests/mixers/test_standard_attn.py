import pytest
import torch

from frankenstein.mixers.standard_attn import softmax_attention, softmax_dense


def random_qkv(*, length: int = 13, width: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 3, width, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def key_mask(length: int = 13) -> torch.Tensor:
    return torch.arange(length)[None] < torch.tensor([[length], [length - 4]])


@pytest.mark.parametrize("mask", [None, key_mask()], ids=["full", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_fused_equals_dense_with_gradients(mask: torch.Tensor | None, causal: bool, scale: float | None) -> None:
    settings = {"key_padding_mask": mask, "causal": causal, "scale": scale}
    results = []
    for function in (softmax_attention, softmax_dense):
        inputs = random_qkv()
        o = function(*inputs, **settings)
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_equal_keys_give_the_mean_of_the_values() -> None:
    q, k, v = random_qkv()
    o = softmax_attention(q, torch.zeros_like(k), v)
    torch.testing.assert_close(o, v.mean(1, keepdim=True).expand_as(o))


def test_a_query_without_any_key_gets_zero_and_finite_gradients() -> None:
    inputs = random_qkv()
    o = softmax_attention(*inputs, key_padding_mask=torch.zeros(2, 13, dtype=torch.bool))
    assert o.abs().max() == 0
    for grad in torch.autograd.grad(o.sum(), inputs):
        assert torch.isfinite(grad).all()
