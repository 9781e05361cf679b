from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.adamw import AdamW
from frankenstein.optimizers.matrix_method import MatrixMethod, iteration_dtype, stacks, symmetric_product
from frankenstein.optimizers.muon import Muon
from frankenstein.optimizers.softmuon import SoftMuon
from frankenstein.optimizers.turbo_muon import TurboMuon

every_matrix_method = pytest.mark.parametrize("cls", [Muon, TurboMuon, SoftMuon])
CPU = torch.device("cpu")


def parameters(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def walk(optimizer: torch.optim.Optimizer, members: list[nn.Parameter], steps: range = range(5)) -> None:
    for step in steps:
        for p, g in zip(members, parameters(*(p.shape for p in members), seed=100 + step), strict=True):
            p.grad = g.data.to(p.dtype)
        optimizer.step()


def assert_equal(some: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    assert all(torch.equal(p, q) for p, q in zip(some, others, strict=True))


@every_matrix_method
def test_vectors_of_a_matrix_group_take_adamw_at_a_share_of_the_rate(cls: type[MatrixMethod]) -> None:
    shapes: list[tuple[int, ...]] = [(5,), (), (1,)]
    ours, theirs, values = parameters(*shapes), parameters(*shapes), {"betas": (0.7, 0.8), "eps": 1e-3}
    walk(cls(ours, lr=0.5, fallback_lr_ratio=0.25, weight_decay=0.1, **values), ours)  # type: ignore[call-arg]
    walk(AdamW(theirs, lr=0.125, weight_decay=0.1, **values), theirs)  # type: ignore[arg-type]
    assert_equal(ours, theirs)


@every_matrix_method
def test_every_parameter_of_a_group_without_matrices_takes_adamw_at_the_full_rate(cls: type[MatrixMethod]) -> None:
    shapes: list[tuple[int, ...]] = [(6, 4), (3, 2, 2), (5,)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    walk(cls([{"params": ours, "matrix": False, "lr": 0.1, "weight_decay": 0.2}]), ours)  # type: ignore[call-arg]
    walk(AdamW(theirs, lr=0.1, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.2), theirs)
    assert_equal(ours, theirs)


def test_gradients_and_parameters_laid_out_differently_take_the_same_adamw_step() -> None:
    plain, turned, strided = (parameters((6, 4)) for _ in range(3))
    turned[0].data = turned[0].data.T.contiguous().T
    strided[0].data = torch.stack([strided[0].data] * 2, -1)[..., 0]
    for members in (plain, turned, strided):
        walk(Muon([{"params": members, "matrix": False}]), members)
    torch.testing.assert_close(turned, plain)
    torch.testing.assert_close(strided, plain)


@every_matrix_method
def test_more_than_two_dimensions_are_flattened_to_the_first_and_the_rest(cls: type[MatrixMethod]) -> None:
    deep, flat = parameters((6, 2, 2)), parameters((6, 4))
    walk(cls(deep), deep)  # type: ignore[call-arg]
    walk(cls(flat), flat)  # type: ignore[call-arg]
    assert torch.equal(deep[0].flatten(1), flat[0])


@every_matrix_method
def test_matrices_worked_on_together_move_as_they_do_alone(cls: type[MatrixMethod]) -> None:
    shapes = [(8, 6), (6, 8), (8, 6), (4, 2, 3), (8, 6)]
    together, alone = parameters(*shapes), parameters(*shapes)
    walk(cls(together), together)  # type: ignore[call-arg]
    walk(cls([{"params": [p]} for p in alone]), alone)  # type: ignore[call-arg]
    assert_equal(together, alone)


@every_matrix_method
def test_a_matrix_that_missed_gradients_goes_on_with_the_momentum_it_had(cls: type[MatrixMethod]) -> None:
    ours, theirs = parameters((4, 3), (4, 3)), parameters((4, 3), (4, 3))[1:]
    optimizer, other = cls(ours), cls(theirs)  # type: ignore[call-arg]
    for step in range(6):
        for p, g in zip(ours, parameters((4, 3), (4, 3), seed=step), strict=True):
            p.grad = g.data
        theirs[0].grad = None if step in (0, 3) else ours[1].grad
        if step in (0, 3):
            ours[1].grad = None
        optimizer.step()
        other.step()
    assert torch.equal(ours[1], theirs[0])


@every_matrix_method
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e18])
def test_gradients_of_any_size_give_finite_steps(cls: type[MatrixMethod], size: float) -> None:
    members = parameters((4, 3), (3, 5))
    before = [p.detach().clone() for p in members]
    optimizer = cls(members, **({"sign_steps": 1, "transition_steps": 3} if cls is SoftMuon else {}))  # type: ignore[call-arg]
    for _ in range(3):
        for p in members:
            p.grad = torch.ones_like(p) * size
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in members)
    assert size != 0 or all(torch.equal(p, q) for p, q in zip(members, before, strict=True))


def test_stacks_hold_equal_shapes_and_are_bounded() -> None:
    members = parameters((300, 400), *[(300, 400)] * 6, (400, 300), (30, 4), (30, 2, 2))
    members[2].data = members[2].data.double()
    found = [[p.shape for p in stack] for stack in stacks(members)]
    assert found == [
        [(300, 400)] * 4,
        [(300, 400)] * 2,
        [(300, 400)],
        [(400, 300)],
        [(30, 4), (30, 2, 2)],
    ]


@pytest.mark.parametrize("rows", [7, 512, 517])
def test_a_symmetric_product_is_the_product(rows: int) -> None:
    X = torch.randn(2, rows, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(symmetric_product(X, X.mT), X @ X.mT)


def test_a_large_one_on_a_cpu_is_mirrored_at_the_diagonal() -> None:
    a, b = torch.ones(1, 512, 2), torch.ones(1, 2, 512)
    b[..., 0] = 7.0  # not symmetric: the first column tells whether it was computed
    assert (symmetric_product(a, b)[0, 128:, 0] == 2).all() and (a @ b)[0, 128:, 0].eq(14).all()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_bfloat16_is_used_where_the_processor_multiplies_it(
    capabilities: Mapping[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert iteration_dtype("bfloat16", CPU) == expected
    assert iteration_dtype("float32", CPU) == torch.float32
    assert iteration_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16


@every_matrix_method
def test_the_iteration_may_run_in_bfloat16(cls: type[MatrixMethod], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(24, 16), (8, 40), (12, 12)]
    exact, rounded, seen = parameters(*shapes), parameters(*shapes), []
    softening = {"sign_steps": 2, "transition_steps": 9} if cls is SoftMuon else {}
    walk(cls(exact, ns_dtype="float32", **softening), exact)  # type: ignore[call-arg]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    optimizer = cls(rounded, **softening)  # type: ignore[call-arg]
    orthogonalize = optimizer.orthogonalize

    def watched(group: dict[str, object], X: Tensor) -> Tensor:
        seen.append(X.dtype)
        return orthogonalize(group, X)

    monkeypatch.setattr(optimizer, "orthogonalize", watched)
    walk(optimizer, rounded)
    assert set(seen) == {torch.bfloat16}
    for p, q in zip(rounded, exact, strict=True):
        assert 1e-5 < (p - q).abs().max() < 6e-3  # five steps of 0.02, elements of 1e-1 rounded to 3 digits


@every_matrix_method
def test_a_step_on_a_gpu_reads_nothing_back(cls: type[MatrixMethod]) -> None:
    with FakeTensorMode():  # tensors without values, on any device: reading a value raises
        shapes = [(64, 48), (64, 48), (48, 64), (6, 2, 2), (5,), ()]
        members = [nn.Parameter(torch.empty(s, device="cuda")) for s in shapes]
        for p in members:
            p.grad = torch.empty_like(p)
        optimizer = cls(members, **({"sign_steps": 1, "transition_steps": 3} if cls is SoftMuon else {}))  # type: ignore[call-arg]
        optimizer.param_groups[0]["schedule"] = [3.0, 2.0, 1.0]  # it is built once, from values
        for _ in range(3):
            optimizer.step()
        assert all(t.device.type == "cuda" for state in optimizer.state.values() for t in state.values())


@every_matrix_method
@pytest.mark.parametrize("argument", ["ns_dtype", "ns_steps", "fallback_lr_ratio", "betas"])
def test_senseless_values_are_errors(cls: type[MatrixMethod], argument: str) -> None:
    with pytest.raises(FrankensteinError, match=f"{cls.name}: {argument}: found -1"):
        cls([{"params": parameters((2, 2)), argument: -1}])  # type: ignore[call-arg]
