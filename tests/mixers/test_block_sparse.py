import pytest
import torch

from frankenstein.mixers import block_sparse
from frankenstein.mixers.block_sparse import Piece, Segments, Tokens, additive, band, masked_softmax, merged_attention

F64 = torch.float64


def random_qkv(*, length: int = 12, width: int = 4, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = [(2, length, 3, 4), (2, length, 3, 4), (2, length, 3, width)]
    return [torch.randn(*s, generator=g, dtype=F64).to(dtype).requires_grad_() for s in shapes]


def with_gradients(o: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return (o, *torch.autograd.grad(o.sin().sum(), inputs))


def checkerboard(length: int = 12) -> torch.Tensor:
    j = torch.arange(length)
    return (j[:, None] + j) % 3 > 0


def three_pieces(kept: torch.Tensor, q: torch.Tensor) -> list[Piece]:
    """All keys below 5 for all queries; the other keys for the early, then for the late queries."""
    return [
        Piece(Tokens(0, 12), Tokens(0, 5), additive(kept[None, None, :, :5], q)),
        Piece(Tokens(0, 4), Tokens(5, 12), additive(kept[None, None, :4, 5:], q)),
        Piece(Tokens(4, 12), Tokens(5, 12), additive(kept[None, None, 4:, 5:], q)),
    ]


@pytest.mark.parametrize("width", [4, 5], ids=["fused", "plain"])
def test_pieces_make_one_softmax_with_gradients(width: int) -> None:
    results = []
    for fast in (True, False):
        inputs = random_qkv(width=width)
        if fast:
            o = merged_attention(*inputs, three_pieces(checkerboard(), inputs[0]), scale=0.7)
        else:
            o = masked_softmax(*inputs, checkerboard(), scale=0.7)
        results.append(with_gradients(o, inputs))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_the_fused_kernel_equals_plain_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for fused in (True, False):
        monkeypatch.setattr(block_sparse, "_fused", lambda q, v, fused=fused: fused)
        inputs = random_qkv()
        o = merged_attention(*inputs, three_pieces(checkerboard(), inputs[0]))
        results.append(with_gradients(o, inputs))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_large_logits_of_different_pieces_stay_finite_and_right() -> None:
    q, k, v = random_qkv()
    inputs = [300 * q.detach(), k.detach(), v.detach()]
    inputs = [x.requires_grad_() for x in inputs]
    fast = with_gradients(merged_attention(*inputs, three_pieces(checkerboard(), q)), inputs)
    plain = with_gradients(masked_softmax(*inputs, checkerboard()), inputs)
    for a, b in zip(fast, plain, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradients_keep_the_dtype(dtype: torch.dtype) -> None:
    inputs = random_qkv(dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results = with_gradients(merged_attention(*inputs, three_pieces(checkerboard(), inputs[0])), inputs)
    expected = with_gradients(masked_softmax(*exact, checkerboard()), exact)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_segments_are_dense_products_of_their_own() -> None:
    q, k, v = random_qkv()
    o = merged_attention(q, k, v, [Piece(Segments(4, 4), Segments(4, 3))])
    j = torch.arange(12)
    kept = (j[:, None] // 4 == j // 4) & (j % 4 < 3)
    torch.testing.assert_close(o, masked_softmax(q, k, v, kept))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("length", [1, 20, 201])
@pytest.mark.parametrize(("reach", "first"), [(0, 0), (3, 0), (9, 2), (500, 1)])
def test_a_band_holds_its_pairs_once(padded: bool, causal: bool, length: int, reach: int, first: int) -> None:
    first = min(first, length - 1)
    q, k, v = random_qkv(length=length)
    mask = torch.arange(length)[None] < torch.tensor([[length], [(length + 1) // 2]]) if padded else None
    j = torch.arange(length)
    kept = ((j[:, None] - j).abs() <= reach) | (j < first)
    kept = kept.tril() if causal else kept
    kept = kept if mask is None else kept & mask[:, None, None]
    pieces = band(q, length, reach, first=first, mask=mask, causal=causal)
    o = merged_attention(q[:, first:], k, v, pieces)
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
    expected = masked_softmax(q, k, v, kept)[:, first:]
    torch.testing.assert_close(o[real[:, first:]], expected[real[:, first:]], rtol=1e-10, atol=1e-12)


def test_the_cost_of_a_band_grows_with_the_kept_pairs() -> None:
    q = torch.zeros(1, 1, 1, 1)
    pairs = []
    for length in (2048, 4096):
        pieces = band(q, length, 100, mask=None, causal=False)
        pairs.append(sum((p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in pieces))
    assert pairs[1] < 2.1 * pairs[0]
    assert pairs[1] < 0.07 * 4096**2


def test_a_query_without_any_key_gets_zero_from_the_plain_form() -> None:
    inputs = random_qkv()
    o = masked_softmax(*inputs, torch.zeros(12, 12, dtype=torch.bool))
    assert o.abs().max() == 0
    for grad in torch.autograd.grad(o.sum(), inputs):
        assert torch.isfinite(grad).all()
