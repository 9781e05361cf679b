"""HoPE: the matrix form against boosts written out, its symmetries, its bounds, and the attention built on it."""

import math

import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.gated_softmax_attn import gated_softmax_attention, gated_softmax_dense
from frankenstein.mixers.hope import Hope, hope_scores, hope_scores_dense
from frankenstein.mixers.standard_attn import softmax_attention, softmax_dense

F64 = torch.float64


def random_qk(length: int, width: int = 6, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(length)
    return [torch.randn(2, length, 3, width, generator=g, dtype=dtype, requires_grad=True) for _ in range(2)]


def boosted(q: torch.Tensor, k: torch.Tensor, base: float, damping: float) -> torch.Tensor:
    """q_m^T B(m t) B(-n t) k_n e^(-(t + damping) |m - n|), pair of channels by pair, with the Lorentz matrix itself."""
    length, width = q.shape[1], q.shape[-1]
    scores = torch.zeros(q.shape[0], q.shape[2], length, length, dtype=F64)
    for m in range(length):
        for n in range(length):
            for i in range(width // 2):
                rate = base ** (-2 * i / width)
                angle = rate * abs(m - n)
                c, s = math.cosh(angle), math.sinh(angle) * (1 if m >= n else -1)
                # B(m t) B(-n t) = B((m - n) t); for later keys the pair changes roles, which is B(|m - n| t) transposed
                # in light-cone coordinates: the sign of sinh.
                boost = math.exp(-(rate + damping) * abs(m - n)) * torch.tensor([[c, s], [s, c]], dtype=F64)
                a, b = q[:, m, :, 2 * i : 2 * i + 2], k[:, n, :, 2 * i : 2 * i + 2]
                scores[:, :, m, n] += torch.einsum("bhx,xy,bhy->bh", a, boost, b)
    return scores


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("form", [hope_scores, hope_scores_dense])
def test_both_forms_are_the_boosts_with_their_decay(form, damping: float) -> None:
    q, k = random_qk(6)
    expected = boosted(q.detach(), k.detach(), 20.0, damping)
    torch.testing.assert_close(form(q, k, base=20.0, damping=damping).detach(), expected)


@pytest.mark.parametrize("damping", [0.0, 2.5])
@pytest.mark.parametrize("length", [1, 4, 5, 9, 33, 130])
def test_matrix_products_equal_the_pairs_with_gradients(length: int, damping: float) -> None:
    results = []
    for form in (hope_scores, hope_scores_dense):
        inputs = random_qk(length)
        scores = form(*inputs, base=50.0, damping=damping)
        results.append((scores, *torch.autograd.grad(scores.sin().sum(), inputs)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-11)


def test_the_score_depends_on_the_distance_alone_and_is_the_dot_product_at_distance_zero() -> None:
    q, k = (x.detach()[:, :1].expand(-1, 40, -1, -1) for x in random_qk(1))
    scores = hope_scores(q, k, damping=0.1)
    torch.testing.assert_close(scores[..., 3:, 3:], scores[..., :-3, :-3])
    torch.testing.assert_close(scores[..., 0, 0], torch.einsum("bthk,bthk->bht", q, k)[..., 0])


def test_reading_backwards_swaps_the_light_cone_coordinates_only() -> None:
    q, k = (x.detach() for x in random_qk(21))
    mirror = torch.tensor([1.0, -1.0], dtype=F64).repeat(3)  # b to -b: u becomes w
    flipped = hope_scores(q.flip(1) * mirror, k.flip(1) * mirror)
    torch.testing.assert_close(flipped.flip(-1, -2), hope_scores(q, k))


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_scores_of_equal_tokens_never_grow_with_the_distance(damping: float) -> None:
    x = random_qk(1)[0].detach()[:, :1].expand(-1, 200, -1, -1)
    scores = hope_scores(x, x, damping=damping)
    assert scores.diff(dim=-1)[..., 0, :].max() <= 0 and scores.diff(dim=-1)[..., -1, :].min() >= 0
    assert scores.min() >= 0


def test_strong_decay_and_long_rows_stay_finite_and_exact() -> None:
    inputs = random_qk(300, dtype=torch.float32)
    scores = hope_scores(*inputs, damping=3.0)
    grads = torch.autograd.grad(scores.sum(), inputs)
    assert all(torch.isfinite(x).all() for x in (scores, *grads))
    exact = hope_scores_dense(*(x.double() for x in inputs), damping=3.0)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_the_softmax_of_the_scores(padded: bool, causal: bool) -> None:
    q, k = random_qk(13)
    v, gate = random_qk(13, width=4)
    mask = torch.arange(13)[None] < torch.tensor([[13], [6]]) if padded else None
    allowed = (
        torch.ones(2, 1, 13, 13, dtype=torch.bool) if mask is None else mask[:, None, None, :].expand(2, 1, 13, 13)
    )
    if causal:
        allowed = allowed.tril()
    logits = hope_scores_dense(q, k, base=9.0, damping=0.2) * 6**-0.5
    expected = torch.einsum("bhij,bjhv->bihv", logits.masked_fill(~allowed, -math.inf).softmax(-1), v)
    settings = {"key_padding_mask": mask, "causal": causal, "scores": Hope(9.0, 0.2)}
    torch.testing.assert_close(softmax_attention(q, k, v, **settings), expected)
    torch.testing.assert_close(gated_softmax_attention(q, k, v, gate, **settings), expected * gate.sigmoid())


def test_without_positions_the_scored_path_is_plain_attention() -> None:
    q, k = random_qk(9)
    v, gate = random_qk(9, width=4)
    plain = lambda q, k: torch.einsum("bihk,bjhk->bhij", q, k)
    torch.testing.assert_close(softmax_attention(q, k, v, scores=plain), softmax_dense(q, k, v))
    torch.testing.assert_close(
        gated_softmax_attention(q, k, v, gate, scale=0.3, scores=plain), gated_softmax_dense(q, k, v, gate, scale=0.3)
    )


def test_a_query_without_any_key_gets_zero_and_finite_gradients() -> None:
    inputs = [*random_qk(9), random_qk(9, width=4)[0]]
    mask = torch.tensor([[True] * 9, [False] * 9])
    o = softmax_attention(*inputs, key_padding_mask=mask, scores=Hope())
    assert o[1].abs().max() == 0 and o[0].abs().min() > 0
    for grad in torch.autograd.grad(o.sin().sum(), inputs):
        assert torch.isfinite(grad).all() and grad[1].abs().max() == 0


def test_odd_widths_are_refused() -> None:
    with pytest.raises(FrankensteinError, match="found 5 channels a head, expected an even number"):
        hope_scores(*random_qk(3, width=5))
