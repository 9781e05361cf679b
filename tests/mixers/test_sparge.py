"""SpargeAttn: the block map against loops and published numbers, the sparse product against the masked dense one."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.sparge import (
    SpargeAttention,
    block_sparse_attention,
    sparge_attention,
    sparge_block_map,
    sparge_dense,
)
from frankenstein.mixers.standard_attn import StandardAttention, softmax_attention
from frankenstein.model.positions import Rotary

F64 = torch.float64


def clustered(length: int, *, batch: int = 2, noise: float = 0.6, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v whose neighbours are alike, as blocks of real text or images are."""
    g = torch.Generator().manual_seed(seed)
    topics = torch.randn(batch, length // 6 + 1, 3, 4, generator=g, dtype=F64).repeat_interleave(6, 1)[:, :length]
    q, k = (topics + noise * torch.randn(batch, length, 3, 4, generator=g, dtype=F64) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, torch.randn(batch, length, 3, 5, generator=g, dtype=F64))]


def right_padding(length: int, *lengths: int) -> torch.Tensor:
    return torch.arange(length)[None] < torch.tensor(lengths)[:, None]


def random_map(length: int, block_q: int, block_k: int, heads: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(length)
    return torch.rand(2, heads, -(-length // block_q), -(-length // block_k), generator=g) < 0.5


def loop_map(q, k, block_q, block_k, simthreshd1, cdfthreshd, topk, causal):
    """The definition, one pair of tokens and one pair of blocks at a time, for one example and head (T, K)."""

    def pooled(x, size):
        blocks = [x[i : i + size] for i in range(0, len(x), size)]
        cosines = [[F.cosine_similarity(a, b, 0) for a in block for b in block] for block in blocks]
        alike = [len(b) == size and sum(c) / len(c) > simthreshd1 for b, c in zip(blocks, cosines, strict=True)]
        return [b.mean(0) for b in blocks], alike

    (qs, q_alike), (ks, k_alike) = pooled(q, block_q), pooled(k, block_k)
    kept = torch.zeros(len(qs), len(ks), dtype=torch.bool)
    for i, query in enumerate(qs):
        visible = [j for j in range(len(ks)) if not causal or j * block_k < (i + 1) * block_q]
        scores = {j: float(query @ ks[j]) * q.shape[-1] ** -0.5 for j in visible if k_alike[j]}
        total = sum(torch.tensor(s, dtype=F64).exp() for s in scores.values())
        cumulated, taken = 0.0, 0
        for j in sorted(scores, key=lambda j: -scores[j]):
            cumulated += float(torch.tensor(scores[j], dtype=F64).exp() / total)
            wanted = taken < int(topk * len(ks)) if topk is not None else cumulated <= cdfthreshd
            if taken > 0 and not wanted:
                break
            kept[i, j], taken = True, taken + 1
        for j in visible:
            if not k_alike[j] or not q_alike[i]:
                kept[i, j] = True
    return kept


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize(("cdfthreshd", "topk"), [(0.6, None), (0.95, None), (None, 0.4)])
@pytest.mark.parametrize(("block_q", "block_k", "length"), [(6, 6, 36), (12, 6, 53), (4, 8, 41), (6, 3, 5)])
def test_the_map_is_that_of_the_definition(block_q, block_k, length, cdfthreshd, topk, causal) -> None:
    q, k, _ = (x.detach() for x in clustered(length))
    settings = (block_q, block_k, 0.3, cdfthreshd, topk, causal)
    names = ("block_q", "block_k", "simthreshd1", "cdfthreshd", "topk", "causal")
    found = sparge_block_map(q, k, **dict(zip(names, settings, strict=True)))
    for example in range(2):
        for head in range(3):
            expected = loop_map(q[example, :, head], k[example, :, head], *settings)
            assert torch.equal(found[example, head], expected)
    if length > 40 and not causal:
        assert not found.all()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_values_and_maps_equal_the_authors_code(dtype: torch.dtype) -> None:
    """thu-ml/SpargeAttn@bfd980b get_block_map_meansim under Triton's interpreter; o from torch's SDPA in float64."""
    case = load_file(Path(__file__).parent / "sparge_attention.safetensors")
    q, k, v = (case[name].to(dtype) for name in "qkv")
    o, block_map = sparge_attention(q, k, v, block_q=16, block_k=16, simthreshd1=0.3, cdfthreshd=0.9)
    assert torch.equal(block_map, case["expected_block_map"]) and not block_map.all()
    tolerance = 1e-9 if dtype == F64 else 1e-5
    torch.testing.assert_close(o.double(), case["expected_o"], rtol=10 * tolerance, atol=tolerance)
    assert o.dtype == dtype
    q, k = case["topk_q"].to(dtype), case["topk_k"].to(dtype)
    block_map = sparge_block_map(q, k, block_q=16, block_k=16, simthreshd1=-0.1, topk=0.5)
    assert torch.equal(block_map, case["expected_topk_block_map"]) and not block_map.all()


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("block_q", "block_k", "length"), [(8, 4, 32), (8, 4, 37), (3, 7, 31), (16, 16, 1)])
def test_the_sparse_product_equals_the_masked_dense_one_with_gradients(
    block_q: int, block_k: int, length: int, padded: bool, causal: bool
) -> None:
    mask = right_padding(length, length, max(1, length - 13)) if padded else None
    sizes = {"block_q": block_q, "block_k": block_k, "causal": causal, "mask": mask}
    block_map = random_map(length, block_q, block_k)
    block_map[:, 0, 0] = True  # one row that keeps every key
    starts_q, starts_k = torch.arange(0, length, block_q), torch.arange(0, length, block_k)
    if padded:  # a map has nothing where no real token is
        block_map &= (starts_q < mask.sum(1)[:, None])[:, None, :, None]
        block_map &= (starts_k < mask.sum(1)[:, None])[:, None, None, :]
    results = []
    for function in (block_sparse_attention, sparge_dense):
        inputs = clustered(length)
        o = function(*inputs, block_map, **sizes)
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


def test_only_kept_pairs_of_blocks_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach() for x in clustered(64))
    block_map = random_map(64, 8, 4)
    pairs, fused = [], F.scaled_dot_product_attention

    def counting(query, key, value, **settings):
        pairs.append(query.shape[0] * query.shape[-2] * key.shape[-2])
        return fused(query, key, value, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    block_sparse_attention(q, k, v, block_map, block_q=8, block_k=4)
    assert sum(pairs) == int(block_map.sum()) * 8 * 4


@pytest.mark.parametrize("settings", [{"cdfthreshd": 1.1}, {"simthreshd1": 1.0, "cdfthreshd": 0.1}, {"topk": 1.0}])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_keeping_everything_is_softmax_attention(settings: dict, causal: bool) -> None:
    q, k, v = clustered(45)
    o, block_map = sparge_attention(q, k, v, block_q=8, block_k=4, causal=causal, **settings)
    torch.testing.assert_close(o, softmax_attention(q, k, v, causal=causal))
    assert block_map.all() or causal


def test_equal_tokens_do_not_pass_a_similarity_threshold_of_one() -> None:
    q = torch.randn(1, 1, 1, 7, generator=torch.Generator().manual_seed(0)).expand(1, 256, 1, 7)
    assert sparge_block_map(q, q, simthreshd1=1.0, cdfthreshd=0.1, block_q=16, block_k=16).all()
    assert not sparge_block_map(q, q, simthreshd1=0.99, cdfthreshd=0.1, block_q=16, block_k=16).all()


def test_every_query_block_keeps_one_and_the_map_grows_with_the_threshold() -> None:
    q, k, _ = clustered(120)
    maps = [
        sparge_block_map(q, k, block_q=12, block_k=6, simthreshd1=-1.0, cdfthreshd=threshold)
        for threshold in (0.0, 0.3, 0.6, 0.9, 0.99, 1.1)
    ]
    assert (maps[0].sum(-1) == 1).all()
    for smaller, larger in pairwise(maps):
        assert not (smaller & ~larger).any() and smaller.sum() < larger.sum()


@pytest.mark.parametrize("pvthreshd", [None, 3.0])
@pytest.mark.parametrize("settings", [{"cdfthreshd": 0.7}, {"topk": 0.3}], ids=["cdf", "topk"])
@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_a_padded_row_equals_the_row_alone(settings: dict, smooth_k: bool, causal: bool, pvthreshd) -> None:
    lengths = [50, 37, 24, 1]
    q, k, v = clustered(50, batch=4)
    mask = right_padding(50, *lengths)
    settings = {**settings, "block_q": 12, "block_k": 6, "simthreshd1": 0.2, "smooth_k": smooth_k, "causal": causal}
    real = mask[:, :, None, None]
    filled = [x.where(real, torch.full((), 1e3, dtype=F64)) for x in (q, k, v)]
    o, block_map = sparge_attention(*filled, mask=mask, pvthreshd=pvthreshd, **settings)
    for row, n in enumerate(lengths):
        alone, own = sparge_attention(*(x[row : row + 1, :n] for x in (q, k, v)), pvthreshd=pvthreshd, **settings)
        torch.testing.assert_close(o[row : row + 1, :n], alone)
        assert torch.equal(block_map[row : row + 1, :, : own.shape[2], : own.shape[3]], own)
        assert not block_map[row, :, own.shape[2] :].any() and not block_map[row, :, :, own.shape[3] :].any()
    assert o.masked_select(~real).abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), (q, k, v)):
        assert grad.masked_select(~real).abs().max() == 0 and torch.isfinite(grad).all()


def test_smoothing_compares_the_keys_without_their_mean() -> None:
    q, k, _ = (x.detach() for x in clustered(48))
    settings = {"block_q": 12, "block_k": 6, "simthreshd1": 0.3, "cdfthreshd": 0.7}
    shifted = sparge_block_map(q, k + 9.0, smooth_k=True, **settings)
    assert torch.equal(shifted, sparge_block_map(q, k - k.mean(1, keepdim=True), **settings))
    assert not torch.equal(shifted, sparge_block_map(q, k + 9.0, **settings))


def online_softmax(q, k, v, kept, block_q, block_k, pvthreshd):
    """Stage 2 as the authors run it, block by block with running maxima, for one head (T, K); counts what it skips."""
    o, skipped = torch.zeros(len(q), v.shape[-1], dtype=F64), 0
    for i in range(kept.shape[0]):
        rows = slice(i * block_q, (i + 1) * block_q)
        query = q[rows] * q.shape[-1] ** -0.5
        highest = torch.full((len(query), 1), -1e9, dtype=F64)
        total, sums = torch.zeros(len(query), 1, dtype=F64), torch.zeros(len(query), v.shape[-1], dtype=F64)
        for j in kept[i].nonzero()[:, 0].tolist():
            columns = slice(j * block_k, (j + 1) * block_k)
            logits = query @ k[columns].T
            local = logits.amax(-1, keepdim=True)
            new = torch.maximum(highest, local)
            total, sums = total * (highest - new).exp(), sums * (highest - new).exp()
            highest = new
            if float((local - new).max()) * 1.4426950408889634 + pvthreshd <= 0:
                skipped += 1
                continue
            total, sums = total + (logits - new).exp().sum(-1, keepdim=True), sums + (logits - new).exp() @ v[columns]
        o[rows] = sums / total
    return o, skipped


@pytest.mark.parametrize("length", [48, 53])
def test_stage_two_is_the_online_softmax_with_skipped_blocks(length: int) -> None:
    q, k, v = (x.detach() for x in clustered(length, noise=0.2))
    q = 4 * q
    block_map = random_map(length, 8, 6) | (torch.arange(-(-length // 6)) == 3)
    for pvthreshd in (0.5, 3.0, 40.0):
        o = block_sparse_attention(q, k, v, block_map, block_q=8, block_k=6, pvthreshd=pvthreshd)
        skips = 0
        for example in range(2):
            for head in range(3):
                row = (x[example, :, head] for x in (q, k, v))
                expected, skipped = online_softmax(*row, block_map[example, head], 8, 6, pvthreshd)
                torch.testing.assert_close(o[example, :, head], expected)
                skips += skipped
        assert (skips > 0) == (pvthreshd < 40)


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_stage_two_at_a_high_threshold_changes_nothing(causal: bool) -> None:
    results = []
    for pvthreshd in (None, 60.0):
        inputs = clustered(53)
        settings = {"block_q": 8, "block_k": 6, "topk": 0.4, "simthreshd1": -1.0, "causal": causal}
        o, _ = sparge_attention(*inputs, pvthreshd=pvthreshd, **settings)
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
    for with_stage_two, without in zip(*results, strict=True):
        torch.testing.assert_close(with_stage_two, without, rtol=1e-9, atol=1e-10)


def test_wrong_settings_are_refused() -> None:
    q, k, v = clustered(8)
    with pytest.raises(FrankensteinError, match=r"found cdfthreshd=0\.5 and topk=0\.5; expected one of them"):
        sparge_attention(q, k, v, cdfthreshd=0.5, topk=0.5)
    with pytest.raises(FrankensteinError, match="found cdfthreshd=None and topk=None"):
        sparge_attention(q, k, v)
    with pytest.raises(FrankensteinError, match="block_q=0"):
        sparge_attention(q, k, v, block_q=0, topk=0.5)
    with pytest.raises(FrankensteinError, match="pvthreshd=0"):
        sparge_attention(q, k, v, topk=0.5, pvthreshd=0.0)
    with pytest.raises(FrankensteinError, match="expected one of them, and null for the other"):
        layer_of(topk=0.5)


def layer_of(*, causal: bool = False, groups: int | None = None, **options) -> SpargeAttention:
    torch.manual_seed(0)
    context = MixerContext(16, 4, 2, 0.0, causal, 32, 0, Rotary(), num_kv_heads=groups)
    return SpargeAttention(context, SpargeAttention.Options(**options)).double().eval()


def test_the_layer_refuses_to_train() -> None:
    with pytest.raises(FrankensteinError, match=r"sparge_attn runs in evaluation only.*train with standard_attn"):
        layer_of().train()(torch.randn(1, 5, 16, dtype=F64))


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("options", [{"cdfthreshd": 1.1}, {"simthreshd1": 1.0}, {"cdfthreshd": 1.1, "pvthreshd": 60.0}])
def test_the_layer_takes_the_weights_of_standard_attention_and_equals_it_with_everything_kept(groups, options) -> None:
    layer = layer_of(groups=groups, block_q=8, block_k=4, **options)
    context = MixerContext(16, 4, 2, 0.0, False, 32, 0, Rotary(), num_kv_heads=groups)
    standard = StandardAttention(context, StandardAttention.Options()).double()
    standard.load_state_dict(layer.state_dict())
    x, mask = torch.randn(2, 43, 16, dtype=F64), right_padding(43, 43, 20)
    torch.testing.assert_close(layer(x, mask)[mask], standard(x, mask)[mask])


def test_the_layer_follows_the_equation() -> None:
    layer = layer_of(block_q=8, block_k=4, simthreshd1=0.0, cdfthreshd=0.5)
    x = torch.randn(1, 6, 16, dtype=F64).repeat_interleave(8, 1)[:, :43] + 0.1 * torch.randn(1, 43, 16, dtype=F64)
    q, k, v = layer.project.linear(x).view(1, 43, 3, 4, 4).unbind(2)
    q, k = Rotary()(q), Rotary()(k)
    smooth = k - k.mean(1, keepdim=True)
    q, k, v, smooth = (t.detach() for t in (q, k, v, smooth))
    kept = torch.stack([loop_map(q[0, :, h], smooth[0, :, h], 8, 4, 0.0, 0.5, None, False) for h in range(4)])
    assert not kept.all()
    hidden = ~kept.repeat_interleave(8, 1).repeat_interleave(4, 2)[:, :43, :43]
    weights = (torch.einsum("ihk,jhk->hij", q[0], k[0]) / 2).masked_fill(hidden, float("-inf")).softmax(-1)
    expected = layer.out(torch.einsum("hij,jhv->ihv", weights, v[0]).flatten(1))
    torch.testing.assert_close(layer(x)[0], expected)


def test_in_a_causal_layer_every_token_sees_itself() -> None:
    layer = layer_of(causal=True, block_q=8, block_k=4, simthreshd1=-1.0, cdfthreshd=0.0)
    x = torch.randn(1, 40, 16, dtype=F64, requires_grad=True)
    values: list[torch.Tensor] = []
    layer.out.register_forward_pre_hook(lambda _, inputs: values.append(inputs[0]))
    layer(x)
    assert values[0].abs().amax(-1).min() > 0
    for t in (0, 5, 21, 39):
        (grad,) = torch.autograd.grad(values[0][0, t].sum(), x, retain_graph=True)
        assert grad[0, t].abs().max() > 0 and (t == 39 or grad[0, t + 1 :].abs().max() == 0)


def test_bfloat16_autocast_works_on_the_sparse_path() -> None:
    layer = layer_of(block_q=8, block_k=4, simthreshd1=-1.0, cdfthreshd=None, topk=0.5).float()
    x = torch.randn(1, 6, 16).repeat_interleave(8, 1)[:, :43]
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert torch.isfinite(low).all()
