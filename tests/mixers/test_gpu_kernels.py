"""Where a GPU kernel takes over: what it is given and what becomes of its results; here others stand in for it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

from frankenstein.mixers import (
    bigbird,
    chunked_gla,
    delta_rule,
    fox,
    gla,
    gpu_kernels,
    hgrn2,
    kda,
    longformer,
    retnet,
    simple_gla,
    sparge,
)

B, T, H, K = 2, 70, 2, 8
PLAIN = {
    "chunk_gla": gla.gla_recurrent,
    "chunk_simple_gla": simple_gla.simple_gla_recurrent,
    "chunk_delta_rule": delta_rule.delta_rule_recurrent,
    "chunk_gated_delta_rule": delta_rule.gated_delta_rule_recurrent,
    "chunk_kda": kda.kda_recurrent,
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plain recurrences in place of the recurrent kernels; the names of those that ran."""
    names: list[str] = []

    def stand_in(name: str, q: Tensor, v: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]]:
        def kernel(
            q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, g_gamma: Tensor | None = None, **options: Any
        ) -> Any:
            names.append(name)
            decays = gates if g_gamma is None else (g_gamma.expand(q.shape[:-1]),)
            return PLAIN[name](q, k, v, *(x.to(q.dtype) for x in decays), **options)

        return kernel

    for module in (chunked_gla, simple_gla, delta_rule, kda, retnet):
        monkeypatch.setattr(module, "recurrent_kernel", stand_in)
    return names


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, H, K, dtype=torch.float64) for _ in range(3))
    return q, F.normalize(k, dim=-1), v


def gate(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(*shape, dtype=torch.float64))


def mask() -> Tensor:
    return torch.arange(T) < torch.tensor([[T], [41]])


def cases() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], dict[str, Any]]]:
    by_head, by_channel = (B, T, H), (B, T, H, K)
    strength = lambda: torch.rand(*by_head, dtype=torch.float64)
    yield "chunk_simple_gla", simple_gla.bidirectional_simple_gla, simple_gla.bidirectional_simple_gla_recurrent, {
        "g": gate(*by_head), "g_rev": gate(*by_head)}  # fmt: skip
    yield "chunk_gla", gla.bidirectional_gla, gla.bidirectional_gla_recurrent, {
        "g": gate(*by_channel), "g_rev": gate(*by_channel)}  # fmt: skip
    yield "chunk_gla", gla.bidirectional_gla, gla.bidirectional_gla_recurrent, {"g": gate(*by_channel)}
    yield "chunk_simple_gla", retnet.bidirectional_retention, retnet.bidirectional_retention_recurrent, {
        "log_gamma": retnet.retention_decay(H).log()}  # fmt: skip
    yield "chunk_delta_rule", delta_rule.bidirectional_delta_rule, None, {"beta": strength(), "beta_rev": strength()}
    yield "chunk_gated_delta_rule", delta_rule.bidirectional_gated_delta_rule, None, {
        "g": gate(*by_head), "beta": strength(), "g_rev": gate(*by_head)}  # fmt: skip
    yield "chunk_kda", kda.bidirectional_kda, None, {"g": gate(*by_channel), "beta": strength()}


@pytest.mark.parametrize("case", range(7))
def test_both_directions_of_a_recurrence_come_from_the_kernel(called: list[str], case: int) -> None:
    q, k, v = tensors()
    name, operator, plain, gates = list(cases())[case]
    got = operator(q, k, v, **gates, mask=mask())
    assert set(called) == {name}
    if plain is not None:
        expected = plain(q, k, v, **gates, mask=mask())
    else:  # without stand-ins, the operator is checked against reference numbers elsewhere
        with pytest.MonkeyPatch.context() as own:
            for module in (delta_rule, kda):
                own.setattr(module, "recurrent_kernel", lambda *_: None)
            expected = operator(q, k, v, **gates, mask=mask())
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_hgrn2_keys_of_the_reverse_direction_are_its_own(called: list[str]) -> None:
    q, f, v = tensors()
    f_rev = torch.randn_like(f)
    got = hgrn2.bidirectional_hgrn2(q, f, v, f_rev=f_rev, mask=mask())
    assert called == ["chunk_gla"]
    expected = hgrn2.bidirectional_hgrn2_recurrent(q, f, v, f_rev=f_rev, mask=mask())
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["gla", "simple_gla", "delta_rule", "gated_delta_rule", "kda", "retention"])
def test_one_way_takes_and_gives_states(called: list[str], name: str) -> None:
    q, k, v = tensors()
    by_head, by_channel, state = (B, T, H), (B, T, H, K), torch.randn(B, H, K, K, dtype=torch.float64)
    strength = torch.rand(*by_head, dtype=torch.float64)
    operator, plain, gates = {
        "gla": (gla.gla, gla.gla_recurrent, [gate(*by_channel)]),
        "simple_gla": (simple_gla.simple_gla, simple_gla.simple_gla_recurrent, [gate(*by_head)]),
        "delta_rule": (delta_rule.delta_rule, delta_rule.delta_rule_recurrent, [strength]),
        "gated_delta_rule": (
            delta_rule.gated_delta_rule, delta_rule.gated_delta_rule_recurrent, [gate(*by_head), strength]),
        "kda": (kda.kda, kda.kda_recurrent, [gate(*by_channel), strength]),
        "retention": (retnet.retention, retnet.retention_recurrent, [retnet.retention_decay(H).log()]),
    }[name]  # fmt: skip
    options = {"initial_state": state, "output_final_state": True, "scale": 0.3}
    o, final = operator(q, k, v, *gates, **options)
    expected, last = plain(q, k, v, *gates, **options)
    assert len(called) == 1
    torch.testing.assert_close(o, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(final, last, atol=1e-6, rtol=1e-5)
    assert operator(q, k, v, *gates)[1] is None


def test_log_decays_that_half_precision_takes_for_forgetting_all_stay_finite() -> None:
    g = torch.tensor([0.0, -3.0, -float("inf")], dtype=torch.float64)
    assert gpu_kernels.log_decay(g).tolist() == [0.0, -3.0, gpu_kernels.LEAST_LOG_DECAY]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_no_kernel_stands_in_on_a_cpu(kind: torch.dtype) -> None:
    x = torch.zeros(1, 4, 1, 16, dtype=kind)
    assert gpu_kernels.recurrent_kernel("chunk_gla", x, x) is None and not gpu_kernels.flex(x)


@pytest.fixture
def flexed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """FlexAttention uncompiled, on the CPU, forward only; the lengths of the rows that came to it.

    Uncompiled, it asks the pattern about all pairs; the kernel only about those of kept blocks, which stands here too.
    """
    lengths: list[int] = []

    def eager(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        lengths.append(q.shape[2])
        if (blocks := options.pop("block_mask", None)) is not None:
            shape = (B, H, LONG, LONG)
            table = blocks.to_dense().bool().expand(B, H, -1, -1)
            for dim, size in zip((2, 3), blocks.BLOCK_SIZE, strict=True):
                table = table.repeat_interleave(size, dim)
            inside = create_mask(blocks.mask_mod, *shape, device="cpu")
            kept = inside & table[..., :LONG, :LONG]
            options["score_mod"] = lambda score, b, h, i, j: torch.where(kept[b, h, i, j], score, -float("inf"))
        return flex_attention(q, k, v, **{name: x for name, x in options.items() if name != "kernel_options"})

    monkeypatch.setattr(gpu_kernels, "_compiled_flex", lambda: eager)
    for module in (bigbird, fox, longformer, sparge):
        monkeypatch.setattr(module, "flex", lambda *_: True)
    monkeypatch.setattr(fox, "half_precision", lambda _: torch.float64)
    return lengths


UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
LONG = 300


def long_tensors(width: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    q, k, v = (torch.randn(B, LONG, H, width, dtype=torch.float64) for _ in range(3))
    return q, k, v, torch.arange(LONG) < torch.tensor([[LONG], [170]])


@UNCOMPILED
@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("window", "first"), [(20, 0), (64, 3), (150, 70), (2, 0)])
def test_longformer_by_blocks(flexed: list[int], causal: bool, padded: bool, window: int, first: int) -> None:
    q, k, v, real = long_tensors()
    options = {"window_size": window, "num_global": first, "mask": real if padded else None, "causal": causal}
    got = longformer.longformer_attention(q, k, v, **options)
    assert flexed == [LONG]
    torch.testing.assert_close(got, longformer.longformer_dense(q, k, v, **options), atol=1e-9, rtol=1e-7)


@UNCOMPILED
@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("full_blocks", [0, 6])
def test_bigbird_by_blocks(flexed: list[int], causal: bool, padded: bool, full_blocks: int) -> None:
    q, k, v, real = long_tensors()
    size, blocks = 32, -(-LONG // 32)
    drawn = bigbird.random_blocks(H, blocks, 2, causal=causal)
    options = {"block_size": size, "full_blocks": full_blocks, "mask": real if padded else None, "causal": causal}
    got = bigbird.bigbird_attention(q, k, v, drawn, **options)
    assert flexed == [LONG]
    torch.testing.assert_close(got, bigbird.bigbird_dense(q, k, v, drawn, **options), atol=1e-9, rtol=1e-7)


@UNCOMPILED
@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_sparge_by_blocks(flexed: list[int], causal: bool, padded: bool) -> None:
    q, k, v, real = long_tensors()
    mask = real if padded else None
    sizes = {"block_q": 64, "block_k": 32}
    chosen = sparge.sparge_block_map(q, k, **sizes, simthreshd1=-1.0, topk=0.4, mask=mask, causal=causal)
    assert 0 < chosen.double().mean() < 0.8
    got = sparge.block_sparse_attention(q, k, v, chosen, **sizes, mask=mask, causal=causal)
    assert flexed == [LONG]
    expected = sparge.sparge_dense(q, k, v, chosen, **sizes, mask=mask, causal=causal)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)


@UNCOMPILED
@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_forgetting_attention_both_ways(flexed: list[int], padded: bool) -> None:
    q, k, v, real = long_tensors()
    g, g_rev = gate(B, LONG, H), gate(B, LONG, H)
    options = {"g_rev": g_rev, "mask": real if padded else None}
    got = fox.bidirectional_forgetting_attn(q, k, v, g, **options)
    assert flexed == [LONG]
    expected = fox.bidirectional_forgetting_attn_dense(q, k, v, g, **options)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)  # the decays come in float32


@UNCOMPILED
@torch.no_grad()
@pytest.mark.parametrize("window", [None, 40])
def test_forgetting_attention_one_way(flexed: list[int], window: int | None) -> None:
    q, k, v, _ = long_tensors()
    g = gate(B, LONG, H)
    got = fox.forgetting_attn(q, k, v, g, window_size=window)
    assert flexed == [LONG]
    expected = fox.forgetting_attn_dense(q, k, v, g, window_size=window)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
