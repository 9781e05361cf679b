"""Multi-head latent attention.

The numbers in mla_attn.safetensors come from transformers 5.24.0 (torch 2.13), DeepseekV3Attention and, in the last
case, DeepseekV2Attention: eager, without yarn, in float64 but for the norms and the softmax, which they compute in
float32. Both ways: an additive mask of zeros; gradients are those of sum(w_o * o) over the real tokens.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from frankenstein.errors import FrankensteinError
from frankenstein.mixers import mla_attn
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.hope import Hope, hope_scores_dense
from frankenstein.mixers.mla_attn import MultiHeadLatentAttention, mla_absorbed, mla_attention, mla_dense
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.positions import Rotary
from frankenstein.quantization.convert import convert_to_bitlinear, ternary_layers

F64 = torch.float64
TOLERANCE = {torch.float32: 1e-5, F64: 3e-6}  # theirs: see above
REFERENCE = load_file(Path(__file__).parent / "mla_attn.safetensors")
#  heads, N, R, V, rank of keys and values, rank of queries, base of the angles, causal
CASES = {
    "both_ways_compressed": (2, 6, 4, 5, 9, 8, 10000.0, False),
    "both_ways": (2, 6, 4, 5, 9, None, 10000.0, False),
    "causal_compressed": (2, 6, 4, 5, 9, 8, 10000.0, True),
    "causal": (3, 5, 2, 4, 7, None, 10000.0, True),
    "padded_wide_values": (3, 3, 4, 9, 5, 6, 100.0, False),
    "narrow_latent": (2, 8, 4, 8, 3, None, 10000.0, False),
    "narrow_latent_causal": (2, 8, 4, 6, 3, 5, 10000.0, True),
    "deepseek_v2": (2, 4, 6, 4, 6, 5, 10000.0, False),
}


def build(*, heads: int = 4, width: int = 16, causal: bool = False, **named: object) -> MultiHeadLatentAttention:
    torch.manual_seed(0)
    rotary, scores = named.pop("rotary", Rotary()), named.pop("scores", None)
    context = MixerContext(width, heads, 2, 0.0, causal, 32, 0, rotary, scores=scores)
    layer = MultiHeadLatentAttention(context, MultiHeadLatentAttention.Options(**named))
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer.double().eval()


def key_mask(*lengths: int) -> Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


def random_inputs(
    content: int = 5, rope: int = 4, value: int = 6, rank: int = 7, length: int = 11
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    shapes = {
        "q": (2, length, 3, content + rope),
        "latent": (2, length, rank),
        "k_rope": (2, length, rope),
        "up_key": (3, content, rank),
        "up_value": (3, value, rank),
    }
    return {name: torch.randn(*s, generator=g, dtype=F64, requires_grad=True) for name, s in shapes.items()}


def expanded(function: Callable[..., Tensor], x: dict[str, Tensor], **settings: object) -> Tensor:
    k_nope, v = (torch.einsum("btc,hnc->bthn", x["latent"], x[name]) for name in ("up_key", "up_value"))
    return function(x["q"], k_nope, x["k_rope"], v, **settings)


@pytest.mark.parametrize("mask", [None, key_mask(11, 6)], ids=["full", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("value", [3, 9, 14], ids="V={}".format)
def test_fused_and_absorbed_equal_dense_with_gradients(
    mask: Tensor | None, causal: bool, scale: float | None, value: int
) -> None:
    settings = {"key_padding_mask": mask, "causal": causal, "scale": scale}
    results = []
    for form in (mla_dense, mla_attention, mla_absorbed):
        x = random_inputs(value=value)
        o = form(**x, **settings) if form is mla_absorbed else expanded(form, x, **settings)
        assert o.shape == (2, 11, 3, value)
        results.append((o, *torch.autograd.grad(o.sin().sum(), list(x.values()))))
    for other in results[1:]:
        for fast, plain in zip(other, results[0], strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_hope_scores_the_decoupled_channels_alone() -> None:
    x, mask = random_inputs(), key_mask(11, 6)
    k_nope, v = (torch.einsum("btc,hnc->bthn", x["latent"], x[name]) for name in ("up_key", "up_value"))
    shared = x["k_rope"][:, :, None].expand(-1, -1, 3, -1)
    logits = torch.einsum("bihn,bjhn->bhij", x["q"][..., :5], k_nope) + hope_scores_dense(x["q"][..., 5:], shared)
    weights = (logits / 3).masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    o = expanded(mla_attention, x, key_padding_mask=mask, scores=Hope())
    torch.testing.assert_close(o, torch.einsum("bhij,bjhv->bihv", weights, v), rtol=1e-10, atol=1e-12)


def test_without_a_rotary_key_it_is_softmax_attention_and_equal_keys_give_the_mean() -> None:
    x = random_inputs()
    k_nope, v = (torch.einsum("btc,hnc->bthn", x["latent"], x[name]) for name in ("up_key", "up_value"))
    o = mla_attention(x["q"], k_nope, torch.zeros_like(x["k_rope"]), v)
    torch.testing.assert_close(o, softmax_attention(x["q"][..., :5], k_nope, v, scale=1 / 3))
    mean = mla_attention(x["q"], torch.zeros_like(k_nope), torch.zeros_like(x["k_rope"]), v)
    torch.testing.assert_close(mean, v.mean(1, keepdim=True).expand_as(mean))


@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
def test_a_query_without_any_key_gets_zero_and_finite_gradients(absorbed: bool) -> None:
    x, mask = random_inputs(), torch.zeros(2, 11, dtype=torch.bool)
    o = mla_absorbed(**x, key_padding_mask=mask) if absorbed else expanded(mla_attention, x, key_padding_mask=mask)
    assert o.abs().max() == 0
    for grad in torch.autograd.grad(o.sum(), list(x.values())):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("value", [3, 14], ids="V={}".format)
@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
def test_what_is_kept_for_the_backward_pass_grows_with_the_tokens_not_their_pairs(absorbed: bool, value: int) -> None:
    def kept(length: int) -> int:
        sizes: list[int] = []
        x = random_inputs(value=value, length=length)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            mla_absorbed(**x) if absorbed else expanded(mla_attention, x)
        return sum(sizes)

    assert kept(400) < 2.01 * kept(200)


def published(name: str, dtype: torch.dtype) -> tuple[MultiHeadLatentAttention, dict[str, Tensor]]:
    """Our layer on the weights of a stored case, and the case."""
    case = {k.removeprefix(f"{name}."): x for k, x in REFERENCE.items() if k.startswith(f"{name}.")}
    heads, nope, rope, value, rank, query_rank, base, causal = CASES[name]
    layer = build(
        heads=heads,
        width=case["x"].shape[-1],
        causal=causal,
        rotary=Rotary(base),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
        kv_lora_rank=rank,
        q_lora_rank=query_rank,
    )
    first = "q_proj" if query_rank is None else "q_a_proj"
    weights = {
        "down.weight": torch.cat([case[f"{first}.weight"], case["kv_a_proj_with_mqa.weight"]]),
        "norm.weight": case["kv_a_layernorm.weight"],
        "up.weight": case["kv_b_proj.weight"],
        "out.weight": case["o_proj.weight"],
    }
    if query_rank is not None:
        weights["query_norm.weight"], weights["up_query.weight"] = case["q_a_layernorm.weight"], case["q_b_proj.weight"]
    layer.load_state_dict(weights)
    return layer.to(dtype), case


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_published_code(name: str, dtype: torch.dtype) -> None:
    layer, case = published(name, dtype)
    x, real = case["x"].clone().to(dtype).detach().requires_grad_(), key_mask(*case["lengths"].tolist())
    o = layer(x, None if real.all() else real)
    (o * case["w_o"].to(dtype))[real].sum().backward()
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(o[real], case["expected_o"][real].to(dtype), **tolerance)
    torch.testing.assert_close(x.grad, case["expected_grad_x"].to(dtype), **tolerance)
    torch.testing.assert_close(layer.up.weight.grad, case["expected_grad_kv_b_proj.weight"].to(dtype), **tolerance)


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the forms that are called, in turn."""
    called: list[str] = []

    def recorded(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs, **settings: called.append(form.__name__) or form(*inputs, **settings)

    for form in (mla_attention, mla_absorbed):
        monkeypatch.setattr(mla_attn, form.__name__, recorded(form))
    return called


@pytest.mark.parametrize("name", CASES)
def test_the_layer_takes_the_narrower_form(name: str, forms: list[str]) -> None:
    layer, case = published(name, torch.float32)
    layer(case["x"])
    assert forms == ["mla_absorbed" if name.startswith("narrow") else "mla_attention"]


def by_hand(layer: MultiHeadLatentAttention, x: Tensor, *, turn: bool = True) -> Tensor:
    """One row (T, D), token by token and head by head; pairs of channels (2i, 2i + 1) turn by position."""

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return y / (y.square().mean() + 1e-6).sqrt() * weight

    def rotate(y: Tensor, position: int) -> Tensor:
        if not turn:
            return y
        z = y.clone()
        for i in range(len(y) // 2):
            angle = position * 10000.0 ** (-2 * i / len(y))
            a, b = y[2 * i], y[2 * i + 1]
            z[2 * i] = a * math.cos(angle) - b * math.sin(angle)
            z[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return z

    heads, nope, rope = layer.num_heads, layer.nope, layer.rope
    queries, keys, values = [], [], []
    for position, token in enumerate(x):
        q, latent, k_rope = (layer.down.weight @ token).split((layer.query_rank, layer.rank, rope))
        if layer.up_query is not None:
            q = layer.up_query.weight @ norm(q, layer.query_norm.weight)
        up = (layer.up.weight @ norm(latent, layer.norm.weight)).view(heads, -1)
        q, k_rope = q.view(heads, -1), rotate(k_rope, position)
        queries.append([torch.cat([q[h, :nope], rotate(q[h, nope:], position)]) for h in range(heads)])
        keys.append([torch.cat([up[h, :nope], k_rope]) for h in range(heads)])
        values.append([up[h, nope:] for h in range(heads)])
    rows = []
    for i in range(len(x)):
        seen = range(i + 1) if layer.causal else range(len(x))
        read = []
        for h in range(heads):
            weights = torch.stack([queries[i][h] @ keys[j][h] / math.sqrt(nope + rope) for j in seen]).exp()
            read.append(sum(w * values[j][h] for w, j in zip(weights / weights.sum(), seen, strict=True)))
        rows.append(layer.out.weight @ torch.cat(read))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize(
    "named",
    [{}, {"q_lora_rank": 5}, {"kv_lora_rank": 3, "qk_nope_head_dim": 7, "v_head_dim": 5}, {"qk_rope_head_dim": 6}],
    ids=str,
)
def test_the_layer_equals_the_equations_by_hand(causal: bool, positions: str, named: dict) -> None:
    layer = build(causal=causal, rotary=Rotary() if positions == "rope" else None, **named)
    x = 3 * torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4), dtype=F64)
    mask = key_mask(5, 3)
    o = layer(x, mask)
    for row, length in enumerate((5, 3)):
        expected = by_hand(layer, x[row, :length], turn=positions == "rope")
        torch.testing.assert_close(o[row, :length], expected, rtol=1e-10, atol=1e-12)


def test_the_default_sizes_have_the_ratios_of_deepseek_v2_lite() -> None:
    def sizes(width: int, heads: int) -> tuple[int, ...]:
        with torch.device("meta"):
            layer = MultiHeadLatentAttention(
                MixerContext(width, heads, 2, 0.0, False, 32, 0, Rotary()), MultiHeadLatentAttention.Options()
            )
        shapes = [tuple(p.shape) for p in (layer.down.weight, layer.up.weight, layer.out.weight)]
        assert shapes[0] == (heads * (layer.nope + layer.rope) + layer.rank + layer.rope, width)
        assert shapes[1:] == [(heads * (layer.nope + layer.value), layer.rank), (width, heads * layer.value)]
        return layer.rank, layer.nope, layer.rope, layer.value

    assert sizes(2048, 16) == (512, 128, 64, 128)
    assert sizes(128, 4) == (32, 32, 16, 32)
    assert sizes(5120, 40) == (512, 128, 64, 128)  # 4 head widths
    assert sizes(2, 1) == (1, 2, 2, 2)
    assert sizes(12, 2) == (3, 6, 4, 6)  # half of 6, made even


def test_channels_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(
        FrankensteinError, match=r"model\.mixers\.mla_attn\.qk_rope_head_dim=3: .* expected an even number"
    ):
        build(qk_rope_head_dim=3)


def encoder(**values: object) -> Encoder:
    torch.manual_seed(0)
    small = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_layers": 2,
        "ffn_hidden_size": 24,
        "layer_pattern": ("mla_attn",),
    }
    return Encoder(ModelOptions(**small, **values), max_length=32).eval()


NARROW = {"mla_attn": {"kv_lora_rank": 2, "q_lora_rank": 6}}


@pytest.mark.parametrize("positions", ["rope", "hope", "none"])
@pytest.mark.parametrize("mixers", [{}, NARROW], ids=["default", "narrow"])
def test_positions_reach_the_decoupled_channels(positions: str, mixers: dict) -> None:
    model = encoder(positions=positions, mixers=mixers)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.arange(5, 12)[None]
    turned = model(ids.flip(1)).flip(1)
    same = torch.allclose(turned, model(ids), atol=1e-5)
    assert same == (positions == "none")


def test_ternary_layers_are_not_absorbed(forms: list[str]) -> None:
    model, ids = encoder(mixers=NARROW), torch.arange(5, 12)[None]
    model(ids)
    assert set(forms) == {"mla_absorbed"}
    forms.clear()
    convert_to_bitlinear(model).train()(ids).sin().sum().backward()
    assert set(forms) == {"mla_attention"}
    assert set(ternary_layers(model)) >= {f"blocks.0.mixer.{name}" for name in ("down", "up_query", "up", "out")}
    assert all(p.grad.abs().max() > 0 and p.grad.isfinite().all() for p in model.blocks.parameters())
