"""The C kernel of Titans' memory against the form in blocks, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frankenstein.kernels import native, titans_memory_cpu
from frankenstein.mixers.titans_blocks import plan_blocks, scan_blocks

pytestmark = pytest.mark.skipif(not native.available(titans_memory_cpu.NAME), reason="needs a C compiler")
SHAPES = [(2, 37, 3, 8, 16), (2, 70, 2, 5, 6), (1, 65, 2, 16, 64), (2, 1, 2, 4, 8), (1, 33, 3, 16, 24)]  # B, T, H, K, V


def tensors(shape: tuple[int, ...], gates: int, state: bool) -> list[Tensor | None]:
    torch.manual_seed(0)
    rows, length, heads, keys, values = shape
    q, k = (F.normalize(torch.randn(rows, length, heads, keys), dim=-1) for _ in range(2))
    v = torch.randn(rows, length, heads, values)
    rate, forget, eta = (torch.rand(gates // 3, rows, length, heads) * most for most in (0.6, 0.2, 0.8))
    own = torch.stack([rate, 1 - forget, eta], 1).flatten(0, 1)
    return [q, k, v, own, 0.1 * torch.randn(rows * heads, 2 * keys, values) if state else None]


def run(inputs: list[Tensor | None], dtype: torch.dtype, both_ways: bool) -> list[Tensor]:
    """Output, last state in one direction, and all gradients."""
    q, k, v, gates, state = (x if x is None else x.to(dtype).requires_grad_() for x in inputs)
    if dtype == torch.float64:
        o, last = scan_blocks(q, k, v, gates, state, plan_blocks(q.shape[1], 1, 16, both_ways=both_ways))
    else:
        o, last = titans_memory_cpu.memory(q, k, v, gates, state, both_ways=both_ways)
    outputs = [o] if both_ways else [o, last]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(dtype) for x in outputs]
    leaves = [x for x in (q, k, v, gates, state) if x is not None]
    return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("gates", "both_ways"), [(3, False), (3, True), (6, True)])
def test_outputs_and_gradients_equal_the_form_in_blocks(shape: tuple[int, ...], gates: int, both_ways: bool) -> None:
    inputs = tensors(shape, gates, state=not both_ways)
    results = (run(inputs, dtype, both_ways) for dtype in (torch.float32, torch.float64))
    for got, expected in zip(*results, strict=True):
        atol = 1e-6 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=atol)


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    inputs, threads = tensors((3, 40, 2, 8, 16), 6, state=False), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(run(inputs, torch.float32, both_ways=True))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_token_of_no_rate_writes_nothing_and_is_read_by_nobody() -> None:
    q, k, v, gates, _ = (x for x in tensors((1, 6, 1, 4, 8), 3, state=False))
    assert q is not None and k is not None and v is not None and gates is not None
    gates[0, :, 2], gates[1], gates[2] = 0.0, 1.0, 0.0
    o, _ = titans_memory_cpu.memory(q, k, v, gates, None, both_ways=True)
    v[:, 2] = 1e3
    changed, _ = titans_memory_cpu.memory(q, k, v, gates, None, both_ways=True)
    assert torch.equal(o, changed)


@pytest.mark.parametrize("both_ways", [False, True])
def test_it_is_an_operator_that_torch_can_trace(both_ways: bool) -> None:
    lanes = native.constant("lanes", titans_memory_cpu.NAME)  # the operator itself takes whole vectors
    inputs = tensors((1, 34, 2, 4, lanes), 3, state=True)
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    torch.library.opcheck(torch.ops.frankenstein.titans_memory.default, (*leaves, both_ways, True))


def test_a_compiled_layer_keeps_it_in_one_graph() -> None:
    leaves = [x.requires_grad_() for x in tensors((1, 34, 2, 4, 6), 3, state=False) if x is not None]
    plan, found = plan_blocks(34, 1, 16, both_ways=True), []
    for scan in (scan_blocks, torch.compile(scan_blocks, fullgraph=True, backend="aot_eager")):
        o, _ = scan(*leaves, None, plan)
        found.append([o, *torch.autograd.grad(o.sin().sum(), leaves)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-6)
