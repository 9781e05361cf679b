import math
from collections.abc import Callable

import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.model.positions import Rotary, rotary_table


@pytest.mark.parametrize(("pairing", "pairs"), [("interleaved", [(0, 1), (2, 3)]), ("half", [(0, 2), (1, 3)])])
def test_every_pair_turns_by_position_times_its_frequency(pairing: str, pairs: list[tuple[int, int]]) -> None:
    x = torch.randn(1, 5, 2, 4, dtype=torch.float64)
    y = Rotary(100.0, pairing)(x)
    for m in range(5):
        for i, (a, b) in enumerate(pairs):
            angle = m * 100.0 ** (-2 * i / 4)
            expected_a = x[0, m, :, a] * math.cos(angle) - x[0, m, :, b] * math.sin(angle)
            expected_b = x[0, m, :, a] * math.sin(angle) + x[0, m, :, b] * math.cos(angle)
            torch.testing.assert_close(y[0, m, :, a], expected_a)
            torch.testing.assert_close(y[0, m, :, b], expected_b)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_scores_depend_on_the_distance_alone_and_lengths_stay(pairing: str) -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 40, 1, 8)
    rotary = Rotary(pairing=pairing)
    scores = torch.einsum("bihk,bjhk->ij", rotary(q), rotary(k))
    torch.testing.assert_close(scores[3:, 3:], scores[:-3, :-3])
    torch.testing.assert_close(rotary(q).norm(dim=-1), q.norm(dim=-1))


def test_tables_keep_float32_precision_under_bfloat16() -> None:
    x = torch.randn(1, 300, 2, 16, dtype=torch.bfloat16)
    rotary = Rotary()
    with torch.autocast("cpu", torch.bfloat16):
        y = rotary(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, rotary(x.double()).bfloat16(), rtol=0.01, atol=0.01)
    exact = rotary_table(300, 16, 10000.0, torch.float64)
    rounded = rotary_table(300, 16, 10000.0, torch.float32)
    assert (rounded - exact).abs().max() < 1e-7


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_sees_no_complex_numbers_and_the_values_stay(pairing: str, dtype: torch.dtype) -> None:
    rotary, x = Rotary(pairing=pairing), torch.randn(2, 9, 3, 8).to(dtype).requires_grad_()
    plain = rotary(x)  # makes the table
    traced = []

    def backend(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        traced.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(rotary.__call__, backend=backend, fullgraph=True)(x)
    assert traced and not any("complex" in name for name in traced)
    upstream = torch.linspace(-1, 1, x.numel()).view(x.shape).to(dtype)
    found, wanted = (torch.autograd.grad(y, x, upstream)[0] for y in (compiled, plain))
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(found, wanted)


def test_longer_rows_extend_the_table_and_inference_does_not_poison_training() -> None:
    rotary = Rotary()
    x = torch.randn(1, 9, 1, 4)
    with torch.inference_mode():
        short = rotary(x[:, :3])
    full = rotary(x.requires_grad_())
    full.sum().backward()
    torch.testing.assert_close(full[:, :3], short)


def test_odd_widths_and_unknown_pairings_are_refused() -> None:
    with pytest.raises(FrankensteinError, match="found 5 channels a head, expected an even number"):
        Rotary()(torch.zeros(1, 2, 1, 5))
    with pytest.raises(FrankensteinError, match="unknown rotary pairing 'spiral'; known: interleaved, half"):
        Rotary(pairing="spiral")
