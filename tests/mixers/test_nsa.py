"""Native sparse attention. The numbers in nsa.safetensors come from fla-org/flash-linear-attention@bc3b101 naive_nsa,
whose mean pooling and window were written in torch (one head of 64 tokens with blocks of 8, and 7 tokens in one block),
those in nsa_bidirectional.safetensors from torch 2.13 scaled_dot_product_attention and topk (one head of 64 tokens,
blocks of 8). Gradients are those of sum(w_o * o) in float64, with the selection held."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers import nsa as module
from frankenstein.mixers import selected_blocks
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.nsa import NativeSparseAttention, Pattern, nsa, nsa_bidirectional, nsa_dense
from frankenstein.model.positions import Rotary

F64 = torch.float64
TOLERANCE = {torch.float32: (1e-4, 1e-4), F64: (1e-9, 1e-9)}
FLOATS = ("q", "k", "v", "g_cmp", "g_slc", "g_swa")


@pytest.fixture(params=["blocks", "blocks_in_parts", "masked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The selected branch by gathered blocks, in one or many parts, or by a mask over all pairs."""
    monkeypatch.setattr(module, "DENSE", 0.0 if request.param == "masked" else 2.0)
    if request.param == "blocks_in_parts":
        monkeypatch.setattr(selected_blocks, "ROWS", 4)
        monkeypatch.setattr(selected_blocks, "LOGITS", 300)
        monkeypatch.setattr(selected_blocks, "PARTIAL", 1)
        monkeypatch.setattr(module, "SCORES", 50)
    yield request.param


def random_inputs(length: int, heads: int = 4, groups: int = 2) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = [(2, length, heads, 4), (2, length, groups, 4), (2, length, groups, 5), *[(2, length, heads)] * 3]
    inputs = [torch.randn(*s, generator=g, dtype=F64) for s in shapes]
    return {n: x.requires_grad_() for n, x in zip(FLOATS, inputs, strict=True)}


def sets(index: torch.Tensor, blocks: int) -> torch.Tensor:
    """(..., S) block numbers, -1 for none, as (..., blocks) bool."""
    return F.one_hot(index.masked_fill(index < 0, blocks), blocks + 1).any(-2)[..., :-1]


@pytest.mark.parametrize("sizes", [(8, 3, 5), (4, 4, 12), (16, 3, 1), (5, 6, 300)], ids=str)
@pytest.mark.parametrize("length", [1, 7, 16, 75, 130])
def test_causal_form_equals_the_equation_with_gradients(length: int, sizes: tuple[int, int, int], way: str) -> None:
    size, counts, window = sizes
    inputs = random_inputs(length)
    o, index = nsa(**inputs, block_size=size, block_counts=counts, window_size=window)
    assert index.shape == (2, length, 2, counts) and index.dtype == torch.int64
    plain, selected = nsa_dense(**inputs, pattern=Pattern(size, counts, window, True))
    assert torch.equal(sets(index, selected.shape[-1]), selected)
    compare(o, plain, inputs)


@pytest.mark.parametrize("sizes", [(8, 4, 6), (4, 5, 13), (16, 4, 1), (5, 6, 300)], ids=str)
@pytest.mark.parametrize("length", [1, 7, 16, 75, 130])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_form_of_both_directions_equals_the_equation_with_gradients(
    length: int, sizes: tuple[int, int, int], padded: bool, way: str
) -> None:
    size, counts, window = sizes
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(1, length // 2)]]) if padded else None
    inputs = random_inputs(length)
    o, selected = nsa_bidirectional(**inputs, block_size=size, block_counts=counts, window_size=window, mask=mask)
    plain, expected = nsa_dense(**inputs, pattern=Pattern(size, counts, window, False), mask=mask)
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    assert torch.equal(selected[real], expected[real])
    compare(o, plain, inputs)


def compare(fast: torch.Tensor, plain: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)
    grads = [torch.autograd.grad(o.sin().sum(), list(inputs.values()), allow_unused=True) for o in (fast, plain)]
    for f, p in zip(*grads, strict=True):
        torch.testing.assert_close(f, torch.zeros_like(f) if p is None else p, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("file", "prefix", "sizes"),
    [("nsa", "g1.", (8, 4, 16)), ("nsa", "short.", (16, 3, 16)), ("nsa_bidirectional", "", (8, 5, 16))],
)
def test_values_gradients_and_selection_equal_published_code(
    file: str, prefix: str, sizes: tuple[int, int, int], dtype: torch.dtype, way: str
) -> None:
    numbers = load_file(Path(__file__).parent / f"{file}.safetensors")
    case = {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}
    inputs = {k: case[k].to(dtype).requires_grad_() for k in FLOATS}
    function = nsa if file == "nsa" else nsa_bidirectional
    o, chosen = function(**inputs, **dict(zip(("block_size", "block_counts", "window_size"), sizes, strict=True)))
    if file == "nsa":
        blocks = -(-o.shape[1] // sizes[0])
        assert torch.equal(sets(chosen, blocks), sets(case["expected_block_indices"], blocks))
    else:
        assert torch.equal(chosen, case["expected_selected"])
    rtol, atol = TOLERANCE[dtype]
    assert o.dtype == dtype
    torch.testing.assert_close(o.double(), case["expected_o"], rtol=rtol, atol=atol)
    (o * case["w_o"].to(dtype)).sum().backward()
    for k, x in inputs.items():
        torch.testing.assert_close(x.grad.double(), case[f"expected_grad_{k}"], rtol=rtol, atol=atol)


def one_branch(name: str, length: int) -> dict[str, torch.Tensor]:
    inputs = random_inputs(length, groups=4)
    for gate in FLOATS[3:]:
        inputs[gate] = torch.full_like(inputs[gate], float(gate == name))
    return inputs


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_all_blocks_selected_or_a_wide_window_are_softmax_attention(causal: bool) -> None:
    function = nsa if causal else nsa_bidirectional
    for gate, sizes in (("g_slc", (4, 10, 3)), ("g_swa", (4, 4, 80))):
        inputs = one_branch(gate, 40)
        o, _ = function(**inputs, **dict(zip(("block_size", "block_counts", "window_size"), sizes, strict=True)))
        qkv = (inputs[n].transpose(1, 2) for n in "qkv")
        torch.testing.assert_close(o, F.scaled_dot_product_attention(*qkv, is_causal=causal).transpose(1, 2))


def test_blocks_of_one_token_make_the_compressed_branch_softmax_attention() -> None:
    inputs = one_branch("g_cmp", 20)
    qkv = [inputs[n].transpose(1, 2) for n in "qkv"]
    o, _ = nsa_bidirectional(**inputs, block_size=1, block_counts=4, window_size=2)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(*qkv).transpose(1, 2))
    o, _ = nsa(**inputs, block_size=1, block_counts=4, window_size=2)
    torch.testing.assert_close(o, F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2))


def test_queries_before_the_first_whole_block_get_nothing_from_the_compressed_branch() -> None:
    o, _ = nsa(**one_branch("g_cmp", 20), block_size=8, block_counts=3, window_size=2)
    assert o[:, :7].abs().max() == 0 and o[:, 7:].abs().amin(-1).min() > 0


def test_a_far_block_is_selected_where_its_mean_fits_the_query(way: str) -> None:
    torch.manual_seed(0)
    k = 0.01 * torch.randn(1, 96, 1, 4, dtype=F64)
    k[:, 40:48] += 3.0  # block 5
    q = torch.ones(1, 96, 2, 4, dtype=F64)
    gates = dict.fromkeys(FLOATS[3:], torch.ones(1, 96, 2, dtype=F64))
    _, selected = nsa_bidirectional(q, k, k, **gates, block_size=8, block_counts=5, window_size=2)
    assert selected[..., 5].all() and (selected.sum(-1) <= 5).all()
    _, index = nsa(q, k, k, **gates, block_size=8, block_counts=4, window_size=2)
    assert sets(index, 12)[:, 48:, :, 5].all() and not sets(index, 12)[:, :40, :, 5].any()


def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient(way: str) -> None:
    inputs, sizes = random_inputs(44), {"block_size": 4, "block_counts": 5, "window_size": 6}
    mask = torch.arange(44)[None] < torch.tensor([[44], [21]])
    o, _ = nsa_bidirectional(**inputs, **sizes, mask=mask)
    alone, _ = nsa_bidirectional(**{n: x[1:, :21] for n, x in inputs.items()}, **sizes)
    torch.testing.assert_close(o[1:, :21], alone)
    assert o[1, 21:].abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), list(inputs.values())):
        assert grad[1, 21:].abs().max() == 0


def test_window_reaches_alike_before_and_after() -> None:
    inputs = {n: x.detach() for n, x in one_branch("g_swa", 90).items()}
    sizes = {"block_size": 8, "block_counts": 4, "window_size": 11}
    o, _ = nsa_bidirectional(**inputs, **sizes)
    flipped, _ = nsa_bidirectional(**{n: x.flip(1) for n, x in inputs.items()}, **sizes)
    torch.testing.assert_close(flipped.flip(1), o)


def test_the_work_grows_with_the_kept_pairs() -> None:
    x = torch.randn(1, 2048, 1, 4)
    pattern = Pattern(32, 4, 2, False)
    index = module._select(x, module._block_means(x, 32, None), pattern, None, 0.5)
    tiles = list(selected_blocks._groups(module._members(index, pattern, 2048), 4))
    rows = sum(t.rows.numel() for t in tiles)
    assert 2048 * 4 <= rows <= 2048 * 4 + 64 * selected_blocks.ROWS  # one tile of each block may be partly filled


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(FrankensteinError, match="block_counts=3: at least 4 blocks are always selected"):
        nsa_bidirectional(**random_inputs(8), block_size=2, block_counts=3)
    with pytest.raises(FrankensteinError, match="block_counts=2: at least 3 blocks are always selected"):
        nsa(**random_inputs(8), block_size=2, block_counts=2)


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_the_layer_follows_the_equation(causal: bool) -> None:
    torch.manual_seed(0)
    context = MixerContext(16, 4, 2, 0.0, causal, 64, 0, Rotary(), num_kv_heads=2)
    options = NativeSparseAttention.Options(block_size=4, block_counts=4, window_size=6)
    layer = NativeSparseAttention(context, options).double()
    torch.nn.init.normal_(layer.gate_weight)
    x = torch.randn(2, 37, 16, dtype=F64)
    mask = torch.arange(37)[None] < torch.tensor([[37], [30]])
    q, k, v = layer.project.linear(x).view(2, 37, 8, 4).split((4, 2, 2), 2)
    gates = (x @ layer.gate_weight.T).sigmoid().view(2, 37, 3, 4).unbind(2)
    real = None if causal else mask
    o, _ = nsa_dense(Rotary()(q), Rotary()(k), v, *gates, pattern=Pattern(4, 4, 6, causal), mask=real)
    expected = layer.out(o.flatten(2))
    torch.testing.assert_close(layer(x, mask)[mask], expected[mask])
    layer(x, mask)[mask].sin().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())
