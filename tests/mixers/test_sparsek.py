"""SparseK. The numbers in sparsek.safetensors come from scipy 1.17.1: optimize.brentq on sum clip(z - tau, 0, 1) = k in
float64; the gradients, of sum(w_p * p), are the Jacobian of the set 0 < p < 1, checked there by central differences."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers import sparsek as module
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.sparsek import Selection, SparseKAttention, sparsek, sparsek_attention, sparsek_dense
from frankenstein.mixers.sparsek_projection import prefix_thresholds

F64 = torch.float64
SELECTIONS = [
    Selection(5, 0.5, 0),
    Selection(128, 0.3, 0),
    Selection(5, 0.5, 6),
    Selection(4, 0.5, 1),
    Selection(300, 1.0, 0),
    Selection(7, 0.5, 300),
]


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize(("case", "k"), [("n7_k3", 3), ("n64_k16", 16), ("n130_k1", 1)])
def test_projection_and_gradient_equal_an_independent_root_finder(case: str, k: int, dtype: torch.dtype) -> None:
    numbers = load_file(Path(__file__).parent / "sparsek.safetensors")
    z = numbers[f"{case}.z"].to(dtype).requires_grad_()
    p = sparsek(z, k)
    assert p.dtype == dtype
    (p * numbers[f"{case}.w_p"].to(dtype)).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(p.double(), numbers[f"{case}.expected_p"], rtol=0, atol=tolerance)
    torch.testing.assert_close(z.grad.double(), numbers[f"{case}.expected_grad_z"], rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("z", "k", "p"),
    [
        ([3.0, 1.0, 0.9, 0.1, -2.0], 2, [1.0, 0.55, 0.45, 0.0, 0.0]),  # both clips are at work
        ([2.0, 2.0, 2.0, 2.0], 3, [0.75] * 4),
        ([5.0, 5.0, 0.0, 0.0], 2, [1.0, 1.0, 0.0, 0.0]),
        ([0.3, 0.1], 2, [1.0, 1.0]),
        ([0.3], 7, [1.0]),
        ([float("-inf"), 0.4, 0.2], 1, [0.0, 0.6, 0.4]),
        ([float("-inf"), 0.4, 0.2], 2, [0.0, 1.0, 1.0]),
        ([float("-inf")] * 2, 0, [0.0, 0.0]),
    ],
)
def test_small_projections_by_hand(z: list[float], k: int, p: list[float]) -> None:
    torch.testing.assert_close(sparsek(torch.tensor(z), k), torch.tensor(p))


def test_the_projection_is_sparsemax_at_one_and_shifts_do_not_matter() -> None:
    z = torch.randn(4, 30, dtype=F64, generator=torch.Generator().manual_seed(0))
    ordered = z.sort(-1, descending=True).values
    sizes = torch.arange(1, 31)
    support = (1 + sizes * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
    tau = (ordered.cumsum(-1).gather(-1, support - 1) - 1) / support
    torch.testing.assert_close(sparsek(z, 1), (z - tau).clamp(min=0))
    torch.testing.assert_close(sparsek(z + 100, 7), sparsek(z, 7))
    torch.testing.assert_close(sparsek(z, 7).sum(-1), torch.full((4,), 7.0, dtype=F64))


def test_entries_that_are_clearly_in_or_out_get_no_gradient() -> None:
    for z in ([5.3, 5.3, 0.1, 0.1], [0.3, 0.1], [7.7, 6.6, 1.1, 0.0]):
        scores = torch.tensor(z, requires_grad=True)
        (sparsek(scores, 2) * torch.arange(4.0)[: len(z)]).sum().backward()
        assert scores.grad.abs().max() == 0


@pytest.mark.parametrize("chunk_size", [1, 8, 128])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_prefix_thresholds_project_every_prefix_with_gradients(spread: float, chunk_size: int) -> None:
    u = spread * torch.randn(3, 60, dtype=F64, generator=torch.Generator().manual_seed(1))
    u.requires_grad_()
    k = (torch.arange(1, 61) / 2).ceil().clamp(max=7)
    past = torch.ones(60, 60, dtype=torch.bool).tril()
    weights = torch.randn(3, 60, 60, dtype=F64, generator=torch.Generator().manual_seed(2))
    plain = sparsek(u[:, None, :].expand(3, 60, 60).masked_fill(~past, float("-inf")), k)
    fast = (u[:, None, :] - prefix_thresholds(u, k, chunk_size)[:, :, None]).clamp(0, 1) * past
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((p * weights).sum(), u)[0] for p in (fast, plain)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


def random_inputs(length: int, heads: int = 4, groups: int = 2, spread: float = 1.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = [(2, length, heads, 4), (2, length, groups, 4), (2, length, groups, 5), (2, length, groups)]
    q, k, v, u = (torch.randn(*s, generator=g, dtype=F64) for s in shapes)
    return [x.requires_grad_() for x in (q, k, v, spread * u)]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("length", [1, 7, 33, 150])
def test_fast_form_equals_the_equation_with_gradients(
    length: int, causal: bool, selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.arange(length)[None] < torch.tensor([[length], [max(1, length - 5)]])
    for spread in (0.1, 1.0, 6.0):
        for queries, real in ((8, None), (128, None), (8, mask)):
            monkeypatch.setattr(module, "QUERIES", queries)
            inputs = random_inputs(length, spread=spread)
            results = []
            for function in (sparsek_attention, sparsek_dense):
                o = function(*inputs, selection=selection, mask=real, causal=causal)
                results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
            for fast, plain in zip(*results, strict=True):
                torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_selecting_everything_is_softmax_attention(causal: bool) -> None:
    q, k, v, u = random_inputs(40, groups=4)
    o = sparsek_attention(q, k, v, u, selection=Selection(40, 1.0), causal=causal)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
    torch.testing.assert_close(o, expected.transpose(1, 2))
    assert torch.autograd.grad(o.sum(), u)[0].abs().max() == 0


def test_unselected_keys_do_not_reach_the_output() -> None:
    q, k, v, u = random_inputs(20, groups=4, spread=10.0)
    o = sparsek_attention(q, k, v, u, selection=Selection(5, 1.0))
    rank = u.argsort(1, descending=True).argsort(1)
    junk = torch.where((rank >= 5)[..., None], 1e3, v)
    torch.testing.assert_close(sparsek_attention(q, k, junk, u, selection=Selection(5, 1.0)), o)


def test_padded_rows_equal_their_unpadded_sequence_and_touch_no_gradient() -> None:
    mask = torch.arange(22)[None] < torch.tensor([[22], [9]])
    for selection in SELECTIONS:
        inputs = random_inputs(22)
        o = sparsek_attention(*inputs, selection=selection, mask=mask)
        alone = sparsek_attention(*(x[1:, :9] for x in inputs), selection=selection)
        torch.testing.assert_close(o[1:, :9], alone)
        assert o[1, 9:].abs().max() == 0
        for grad in torch.autograd.grad(o.sin().sum(), inputs):
            assert grad[1, 9:].abs().max() == 0


@pytest.mark.parametrize("window_size", [0, 6])
def test_reversing_the_input_reverses_the_output(window_size: int) -> None:
    inputs, selection = random_inputs(37), Selection(5, 0.5, window_size)
    flipped = sparsek_attention(*(x.flip(1) for x in inputs), selection=selection)
    torch.testing.assert_close(flipped.flip(1), sparsek_attention(*inputs, selection=selection))


def build(*, causal: bool = False, kv_heads: int | None = None, **options: float) -> tuple:
    torch.manual_seed(0)
    context = MixerContext(8, 2, 2, 0.0, causal, 16, 0, None, num_kv_heads=kv_heads)
    layer = SparseKAttention(context, SparseKAttention.Options(**options)).double()
    return layer, torch.randn(2, 7, 8, dtype=F64)


def test_the_layer_follows_the_equation() -> None:
    layer, x = build(top_k=3)
    torch.nn.init.normal_(layer.score_weight, std=0.3)
    q, k, v = layer.project.linear(x).view(2, 7, 3, 2, 4).unbind(2)
    u = x @ layer.score_weight.T
    o = torch.zeros(2, 7, 2, 4, dtype=F64)
    for b in range(2):
        for h in range(2):
            best = u[b, :, h].topk(3).indices
            low, high = u[b, :, h].min() - 1, u[b, :, h].max()
            for _ in range(100):  # tau by bisection
                tau = (low + high) / 2
                low, high = (tau, high) if (u[b, :, h] - tau).clamp(0, 1).sum() > 3 else (low, tau)
            p = (u[b, best, h] - tau).clamp(0, 1)
            weights = (q[b, :, h] @ k[b, best, h].T / 2).softmax(-1)
            o[b, :, h] = weights @ (p[:, None] * v[b, best, h])
    torch.testing.assert_close(layer(x), layer.out(o.flatten(2)))


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("window_size", [0, 3])
def test_the_scorer_learns_also_in_short_rows_and_with_grouped_heads(causal: bool, window_size: int) -> None:
    layer, x = build(causal=causal, kv_heads=1, window_size=window_size)
    layer(x).sin().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_a_slope_prefers_later_tokens_and_is_refused_both_ways() -> None:
    layer, x = build(causal=True, top_k=2, position_slope=50.0)
    changed = x.clone()
    changed[:, 0] += 1.0
    torch.testing.assert_close(layer(x)[:, 3:], layer(changed)[:, 3:])
    with pytest.raises(FrankensteinError, match=r"sparsek_attn\.position_slope=0\.1 needs model\.causal: true"):
        build(position_slope=0.1)
