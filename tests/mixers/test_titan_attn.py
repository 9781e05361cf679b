import pytest
import torch
import torch.nn.functional as F

from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.hope import Hope
from frankenstein.mixers.titan_attn import TitansMemoryAsGate, prefix_window_attention, prefix_window_dense
from frankenstein.mixers.titans_memory import bidirectional_titans_memory_recurrent, titans_memory_recurrent
from frankenstein.model.positions import Rotary

F64 = torch.float64


def build(*, causal: bool = False, scores: Hope | None = None, **options: object) -> TitansMemoryAsGate:
    torch.manual_seed(0)
    rotary = Rotary() if scores is None else None
    context = MixerContext(16, 4, 2, 0.0, causal, 32, 0, rotary, scores=scores)
    layer = TitansMemoryAsGate(context, TitansMemoryAsGate.Options(**options)).double()
    torch.nn.init.normal_(layer.persistent)
    return layer


def tokens(length: int = 11, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(5), dtype=F64)


def without_learning(layer: TitansMemoryAsGate) -> TitansMemoryAsGate:
    with torch.no_grad():
        layer.rates_bias[: layer.num_heads] = -torch.inf
    return layer


def attention_branch(layer: TitansMemoryAsGate, x: torch.Tensor, window: int) -> torch.Tensor:
    """Norm of softmax attention over the persistent tokens and the window, plainly: (B, T, H, K)."""
    prefix = len(layer.persistent)
    longer = torch.cat([layer.persistent.expand(len(x), -1, -1), x], 1)
    q, k, v = layer.project.linear(longer).unflatten(-1, (3, 4, 4)).unbind(2)
    q, k = layer.project.rotary(q), layer.project.rotary(k)
    y = prefix_window_dense(q, k, v, window=window, num_prefix=prefix, causal=layer.causal)[:, prefix:]
    return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.attention_norm.weight


def random_qkv(length: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, 2, 4, generator=g, dtype=F64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("num_prefix", [0, 3])
@pytest.mark.parametrize(("length", "window"), [(1, 4), (9, 1), (9, 4), (9, 40), (200, 7), (200, 150)])
def test_windowed_attention_equals_the_masked_one_with_gradients(
    length: int, window: int, num_prefix: int, padded: bool, causal: bool
) -> None:
    length += num_prefix
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(num_prefix + 1, length - 5)]]) if padded else None
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    settings = {"window": window, "num_prefix": num_prefix, "mask": mask, "causal": causal}
    results = []
    for function in (prefix_window_attention, prefix_window_dense):
        q, k, v = random_qkv(length)
        o = function(q, k, v, **settings)[:, -(length - num_prefix) :]
        o = o[real[:, num_prefix:]]
        results.append((o, *torch.autograd.grad(o.sin().sum(), (q, k, v))))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("window", [4, 40])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_dot_products_that_are_given_replace_those_of_queries_and_keys(window: int, causal: bool) -> None:
    q, k, v = random_qkv(13)
    mask = torch.arange(13)[None] < torch.tensor([[13], [4]])
    settings = {"window": window, "num_prefix": 2, "mask": mask, "causal": causal}
    plain = prefix_window_attention(q, k, v, **settings)
    scored = prefix_window_attention(q, k, v, **settings, scores=lambda q, k: q.transpose(1, 2) @ k.permute(0, 2, 3, 1))
    torch.testing.assert_close(scored[mask[:, 2:]], plain[mask[:, 2:]])
    assert torch.isfinite(scored).all()


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("window", [3, 1024])
def test_without_a_learning_rate_only_attention_is_left(window: int, causal: bool) -> None:
    layer, x = without_learning(build(causal=causal, window=window)), tokens()
    expected = layer.out(attention_branch(layer, x, window).flatten(2) * F.silu(layer.gate(x)))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_the_layer_follows_the_papers_equations(chunk_size: int, causal: bool) -> None:
    layer, x = build(causal=causal, memory_chunk_size=chunk_size, window=4), tokens()
    longer = torch.cat([layer.persistent.expand(2, -1, -1), x], 1)
    q_k_v = F.silu(layer.memory_project.conv(layer.memory_project.linear(longer)))
    q, k, v = q_k_v.unflatten(-1, (3, 4, 4)).unbind(2)
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    part, eta, alpha = (longer @ layer.rates.T + layer.rates_bias).sigmoid().unflatten(-1, (3, 4)).unbind(2)
    theta = part * (1 - eta) / (2 * chunk_size)
    if causal:
        memory, _, _ = titans_memory_recurrent(q, k, v, theta, alpha, eta, chunk_size=chunk_size)
    else:
        memory = bidirectional_titans_memory_recurrent(q, k, v, theta, alpha, eta, chunk_size=chunk_size)
    memory = memory[:, 4:]
    memory = memory / (memory.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.memory_norm.weight
    y = attention_branch(layer, x, 4) * 2 * memory.sigmoid()
    torch.testing.assert_close(layer(x), layer.out(y.flatten(2) * F.silu(layer.gate(x))))


def test_memory_carries_what_the_window_does_not_see() -> None:
    x = tokens(40, rows=1)
    changed = x.clone()
    changed[:, 0] += 1
    layer = build(window=3, num_persistent=0)
    assert (layer(changed) - layer(x))[:, 20:].abs().max() > 1e-4
    layer = without_learning(layer)
    assert torch.equal(layer(changed)[:, 20:], layer(x)[:, 20:])


def test_persistent_tokens_and_the_output_gate_can_be_left_out() -> None:
    layer, x = build(num_persistent=0, output_gate=False, window=None), tokens()
    assert layer.gate is None and layer.persistent.numel() == 0
    wide = build(num_persistent=0, output_gate=False, window=64)
    torch.testing.assert_close(layer(x), wide(x))
    layer = without_learning(layer)
    torch.testing.assert_close(layer(x), layer.out(attention_branch(layer, x, 64).flatten(2)))


def test_hyperbolic_positions_take_the_place_of_the_rotary_ones() -> None:
    x = tokens()
    near, far = (build(scores=Hope(), window=window)(x) for window in (3, None))
    assert torch.isfinite(near).all() and (near - far).abs().max() > 1e-4
    assert (build()(x) - far).abs().max() > 1e-4


@pytest.mark.parametrize("chunk_size", [1, 16])
def test_the_memory_stays_bounded_when_a_token_is_repeated_at_the_highest_rates(chunk_size: int) -> None:
    layer = build(causal=True, memory_chunk_size=chunk_size, num_persistent=0)
    with torch.no_grad():
        layer.rates_bias.copy_(torch.tensor([20.0, 3.0, -20.0]).repeat_interleave(4))  # learn all, forget nothing
        repeated = layer._remember(tokens(1, rows=1).expand(1, 1500, 16), None)
        mixed = layer._remember(tokens(1500, rows=1), None)
    assert repeated.abs().max() < 10 and mixed.abs().max() < 100


def test_heads_start_with_horizons_from_a_thousand_tokens_to_ten() -> None:
    _, _, alpha = build().rates_bias.sigmoid().chunk(3)
    assert alpha[[0, -1]].tolist() == pytest.approx([0.001, 0.1])
