"""The C kernel of the selective scan against the form in torch operations, in float64."""

import pytest
import torch
from torch import Tensor

from frankenstein.kernels import native, selective_scan_cpu
from frankenstein.mixers.tiled_scan import tiled_scan

pytestmark = pytest.mark.skipif(not native.available(selective_scan_cpu.NAME), reason="needs a C compiler")
SHAPES = [(2, 37, 70, 5), (1, 16, 40, 16), (2, 33, 8, 1), (3, 1, 8, 16), (1, 50, 136, 3)]  # B, T, D, N


def tensors(rows: int, length: int, width: int, states: int) -> list[Tensor]:
    torch.manual_seed(0)
    tokens, weights = (rows, length, width), (rows, length, states)
    rates = -4 * torch.rand(width, states)
    return [torch.randn(tokens), torch.rand(tokens), rates, torch.randn(weights), torch.randn(weights)]


def run(inputs: list[Tensor], dtype: torch.dtype, reverse: bool) -> list[Tensor]:
    """Output, last state and all gradients."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    y, last = (tiled_scan if dtype == torch.float64 else selective_scan_cpu.scan)(*leaves, reverse=reverse)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(dtype) for x in (y, last)]
    return [y, last, *torch.autograd.grad([y, last], leaves, weights)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_equal_the_form_in_torch_operations(
    shape: tuple[int, int, int, int], reverse: bool
) -> None:
    inputs = tensors(*shape)
    for got, expected in zip(run(inputs, torch.float32, reverse), run(inputs, torch.float64, reverse), strict=True):
        atol = 1e-6 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=atol)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    inputs, threads = tensors(3, 40, 136, 16), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(run(inputs, torch.float32, False))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_decay_below_the_smallest_number_is_zero_and_none_is_one() -> None:
    rates = torch.tensor([[-1e9], [-1e-30]] * 4)
    ones = torch.ones(1, 3, 8)
    y, last = selective_scan_cpu.scan(ones, ones, rates, torch.ones(1, 3, 1), torch.ones(1, 3, 1))
    assert y[0, :, 0].tolist() == [1.0, 1.0, 1.0], "everything before is forgotten"
    assert y[0, :, 1].tolist() == [1.0, 2.0, 3.0], "nothing is forgotten"
    assert last[0, :2, 0].tolist() == [1.0, 3.0]


def test_what_is_not_a_number_stays_visible() -> None:
    u, *others = tensors(1, 4, 8, 2)
    u[0, 1, 3] = float("nan")
    y, _ = selective_scan_cpu.scan(u, *others)
    assert y[0, 1:, 3].isnan().all() and y[0, 0].isfinite().all() and y[0, :, :3].isfinite().all()


@pytest.mark.parametrize("grad", [False, True])
def test_it_is_an_operator_that_torch_can_trace(grad: bool) -> None:
    u, dt, A, B, C = (x.requires_grad_(grad) for x in tensors(2, 20, 16, 3))
    arguments = (u, dt, A.detach().mT.contiguous().requires_grad_(grad), B, C, False, grad)
    torch.library.opcheck(torch.ops.frankenstein.selective_scan.default, arguments)


def test_a_compiled_layer_keeps_it_in_one_graph() -> None:
    leaves = [x.requires_grad_() for x in tensors(2, 20, 12, 3)]
    found = []
    for scan in (tiled_scan, torch.compile(tiled_scan, fullgraph=True, backend="aot_eager")):
        y, last = scan(*leaves)
        found.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), leaves)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)
