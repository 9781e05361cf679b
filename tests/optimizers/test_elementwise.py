"""What the elementwise optimizers share. The numbers in <name>.safetensors are trajectories of the implementation that
the file's "source" names: start, twelve gradients, and the parameters after steps 1, 2, 6 and 12."""

from pathlib import Path
from threading import Barrier, current_thread, main_thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers import OPTIMIZERS
from frankenstein.optimizers import elementwise as module

UNSCALED = ["lion", "adan", "adopt", "ademamix", "radam"]
SCALED = ["cautious_adamw", "mars_adamw", "lamb"]
BY_NORMS = ["mars_adamw", "lamb"]
SETTINGS: dict[str, dict[str, Any]] = {"adopt": {"lr": 0.002, "betas": (0.9, 0.99), "weight_decay": 0.1}}
SETTINGS |= {"lamb": {"lr": 0.01, "weight_decay": 0.0}}

every_method = pytest.mark.parametrize("name", UNSCALED + SCALED)


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(37, 29), (5,), (), (0,), (3, 4, 2, 5), (300,), (64, 16)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype).to(device)) for s in shapes]


def run(name: str, members: list[nn.Parameter], steps: int = 7, **arguments: Any) -> list[torch.Tensor]:
    """The members after some steps with given gradients, and their state."""
    optimizer = OPTIMIZERS[name](members, **{"lr": 0.05, "weight_decay": 0.1, **arguments})
    for seed in range(steps):
        generator = torch.Generator().manual_seed(seed)
        for p in members:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()
    kept = [t for p in members for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)]
    return [p.detach() for p in members] + kept


@every_method
def test_twelve_steps_equal_the_published_implementation(name: str) -> None:
    numbers = load_file(Path(__file__).parent / f"{name}.safetensors")
    members = {key: nn.Parameter(numbers[f"init/{key}"].clone()) for key in ("emb", "bias", "scalar")}
    optimizer = OPTIMIZERS[name](list(members.values()), **SETTINGS.get(name, {}))
    for step in range(1, 13):
        for key, p in members.items():
            p.grad = numbers[f"grad{step - 1:02d}/{key}"].clone()
        optimizer.step()
        for key, p in members.items():
            if f"step{step:02d}/{key}" in numbers:
                torch.testing.assert_close(p.data, numbers[f"step{step:02d}/{key}"], rtol=0, atol=1e-6)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_does_not_depend_on_how_tensors_are_cut(
    name: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncut = run(name, parameters(dtype))
    monkeypatch.setattr(module, "CALL", 128)
    monkeypatch.setattr(module, "GRAIN", 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # of the pool only: torch's own stay as they are
    cut = run(name, parameters(dtype))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] if name in BY_NORMS else 0.0
    for a, b in zip(cut, uncut, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("kept", [0, 10])
def test_a_tensor_that_threads_share_gets_the_same_bits(name: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALL", 128)
    monkeypatch.setattr(module, "GRAIN", 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(module, "KEPT", kept)
    found = []
    for shared in (0, 3, 1000):  # all tensors, those of more than three calls, none
        monkeypatch.setattr(module, "SHARED", shared)
        found.append(run(name, parameters()))
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(*found, strict=True))


@every_method
def test_whole_tensors_as_an_accelerator_gets_them_give_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = run(name, parameters())
    monkeypatch.setattr(module, "_clusters", lambda rows: [module._together(rows)])
    assert all(torch.equal(a, b) for a, b in zip(run(name, parameters()), pieces, strict=True))


@every_method
def test_a_step_reads_no_value_from_the_device(name: str) -> None:
    members = parameters(device="meta")  # which has no values: .item() and comparisons would raise
    assert all(t.is_meta for t in run(name, members))


@every_method
def test_memory_layout_does_not_change_the_result(name: str) -> None:
    start = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    holder = torch.full((12, 4, 3, 5), 7.0)
    holder[::2] = start
    layouts = [
        start.clone(),
        start.clone(memory_format=torch.channels_last),
        start.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        holder[::2],
    ]
    results = []
    for layout in layouts:
        p = nn.Parameter(layout)
        assert p.data_ptr() == layout.data_ptr() and p.stride() == layout.stride()
        optimizer = OPTIMIZERS[name]([p], lr=0.05, weight_decay=0.1)
        for seed in range(4):
            row = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed))
            p.grad = row.expand(6, 4, 3, 5)  # stride 0
            optimizer.step()
        results.append(p.detach())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)
    assert (holder[1::2] == 7).all() and not torch.allclose(results[0], start)


@every_method
def test_a_parameter_that_missed_gradients_is_as_far_as_its_own_steps(name: str) -> None:
    late, alone, other = (nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(3))
    both = OPTIMIZERS[name]([late, other], lr=0.05, weight_decay=0.1)
    single = OPTIMIZERS[name]([alone], lr=0.05, weight_decay=0.1)
    for step in range(9):
        g = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        other.grad = g.flip(0)
        late.grad = alone.grad = g.clone() if step % 3 == 1 else None
        both.step()
        single.step()
    assert both.state[late]["step"] == 3 and both.state[other]["step"] == 9
    assert torch.equal(late, alone)


@every_method
def test_sparse_gradients_are_an_error(name: str) -> None:
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        FrankensteinError, match=rf"{name}: gradient: found .*sparse.*\(5, 3\): expected a real and dense"
    ):
        OPTIMIZERS[name](table.parameters()).step()


def test_small_tensors_share_a_call_and_large_ones_have_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALL", 100)
    monkeypatch.setattr(module, "GRAIN", 50)
    rows = [(torch.zeros(n), torch.zeros(n)) for n in (30, 70, 1, 250, 99)]

    def calls() -> list[list[list[int]]]:
        return [[[t.numel() for t in lists.params] for lists in c.calls] for c in module._clusters(rows)]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert calls() == [[[30, 70]], [[100], [100], [50]], [[1, 99]]]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert calls() == [[[50, 20]], [[50, 50], [50, 50], [50]], [[50, 49]], [[30, 1]]]


def test_items_are_shared_out_among_threads_and_results_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    meeting, names = Barrier(3, timeout=60), set()

    def work(item: int) -> int:
        assert not torch.is_grad_enabled()
        names.add(current_thread().name)
        meeting.wait()
        return item * item

    assert module.share_out(work, range(6)) == [0, 1, 4, 9, 16, 25]
    assert len(names) == 3 and module.share_out(work, []) == []


def test_an_error_in_any_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    meeting = Barrier(2, timeout=60)

    def work(item: int) -> None:
        meeting.wait()
        if current_thread() is not main_thread():
            raise ArithmeticError(f"item {item}")

    with pytest.raises(ArithmeticError, match="item"):
        module.share_out(work, [0, 1])
