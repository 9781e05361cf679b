from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.galore_adamw import GaLoreAdamW

FROZEN = load_file(Path(__file__).with_name("galore_adamw.safetensors"))


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def gradient(p: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def test_the_first_step_by_hand() -> None:
    tall, wide, vector = (nn.Parameter(torch.ones_like(p)) for p in parameters((3, 2), (2, 3), (2,)))
    tall.grad = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    wide.grad, vector.grad = tall.grad.T.contiguous(), torch.tensor([2.0, 0.0], dtype=torch.float64)
    groups = [{"params": [tall, wide], "rank": 1, "scale": 0.5}, {"params": [vector]}]
    GaLoreAdamW(groups, lr=0.1, eps=1e-9, weight_decay=0.2).step()
    # rank 1 sees only the entry with the largest singular value, 3: sign times lr times scale; then the decay
    moved = torch.tensor([[0.05, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(tall.data, (1 - moved) * 0.98, rtol=0, atol=1e-7)
    torch.testing.assert_close(wide.data, (1 - moved.T) * 0.98, rtol=0, atol=1e-7)
    torch.testing.assert_close(vector.data, torch.tensor([0.9, 1.0], dtype=torch.float64) * 0.98, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "rank"), [((6, 4), 2), ((4, 6), 2), ((5, 5), 3), ((6, 4), 9), ((6, 4), None), ((4,), 2), ((3, 2, 2), 2)]
)
def test_fifty_steps_equal_the_published_rule_in_double_precision(shape: tuple[int, ...], rank: int | None) -> None:
    (p,) = parameters(shape)
    group = {"params": [p], "rank": rank, "update_proj_gap": 7, "scale": 0.3}
    optimizer = GaLoreAdamW([group], lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    want, m, v = p.detach().clone(), torch.zeros(()), torch.zeros(())
    left, right, scale = torch.eye(shape[0], dtype=torch.float64), torch.eye(shape[-1], dtype=torch.float64), 1.0
    for t in range(50):
        p.grad = g = gradient(p, t)
        optimizer.step()
        if rank is not None and len(shape) == 2:
            if t % 7 == 0:  # moments stay as they are when the projection changes
                U, _, Vh = torch.linalg.svd(g.float(), full_matrices=False)
                if shape[0] >= shape[1]:
                    right, scale = Vh[:rank].T.double(), 0.3
                else:
                    left, scale = U[:, :rank].double(), 0.3
            R = left.T @ g @ right
        else:
            R = g
        m, v = 0.8 * m + 0.2 * R, 0.95 * v + 0.05 * R * R
        N = m / (v.sqrt() + 1e-3)
        back = left @ N @ right.T if R is not g else N
        want = want - 0.02 * (1 - 0.95 ** (t + 1)) ** 0.5 / (1 - 0.8 ** (t + 1)) * scale * back
        want = want * (1 - 0.02 * 0.1)
    torch.testing.assert_close(p.detach(), want, rtol=1e-9, atol=1e-11)


def test_it_reproduces_the_frozen_steps_of_the_reference() -> None:
    members = {n: nn.Parameter(FROZEN[f"init/{n}"].clone()) for n in ("w", "wt", "bias")}
    matrices = {"params": [members["w"], members["wt"]], "rank": 4, "update_proj_gap": 200, "scale": 0.25}
    optimizer = GaLoreAdamW([{"params": [members["bias"]]}, matrices], lr=1e-3)
    for t in range(12):
        for n, p in members.items():
            p.grad = FROZEN[f"grad{t:02d}/{n}"].clone()
        optimizer.step()
        for n, p in members.items():
            if f"galore_adamw_a/step{t + 1:02d}/{n}" in FROZEN:
                torch.testing.assert_close(p.data, FROZEN[f"galore_adamw_a/step{t + 1:02d}/{n}"], rtol=0, atol=1e-6)


def test_the_state_has_the_size_of_the_projected_gradient() -> None:
    tall, wide = parameters((12, 6), (6, 12), dtype=torch.bfloat16)
    optimizer = GaLoreAdamW([tall, wide], rank=2)
    tall.grad, wide.grad = gradient(tall, 0), gradient(wide, 0)
    optimizer.step()
    for p, shape, projection in ((tall, (12, 2), (2, 6)), (wide, (2, 12), (6, 2))):
        state = optimizer.state[p]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == shape and state["projection"].shape == projection
        for tensor in (state["exp_avg"], state["exp_avg_sq"], state["projection"]):
            assert tensor.dtype == torch.bfloat16
            assert tensor.untyped_storage().nbytes() == 2 * tensor.numel()  # no view of the whole SVD


def test_a_matrix_that_misses_a_gradient_renews_its_projection_by_its_own_steps() -> None:
    both, alone = parameters((5, 3), (5, 3)), parameters((5, 3))
    optimizer, reference = (GaLoreAdamW(x, rank=1, update_proj_gap=3) for x in (both, alone))
    for step in range(8):
        both[0].grad, both[1].grad = gradient(both[0], step), gradient(both[1], step)
        if step in (0, 2, 5):
            both[0].grad = None
        else:
            alone[0].grad = both[0].grad.clone()
            reference.step()
        optimizer.step()
    assert torch.equal(both[0], alone[0]) and not torch.equal(both[0], both[1])


def test_rows_without_gradient_do_not_move() -> None:
    (p,) = parameters((8, 3), dtype=torch.float32)
    before = p.detach().clone()
    optimizer = GaLoreAdamW([p], lr=0.1, rank=2, update_proj_gap=2)
    for step in range(5):
        p.grad = gradient(p, step)
        p.grad[5:] = 0
        optimizer.step()
    assert torch.equal(p[5:], before[5:]) and torch.isfinite(p).all() and not torch.equal(p[:5], before[:5])


def test_wrong_arguments_and_sparse_gradients_are_named() -> None:
    with pytest.raises(FrankensteinError, match="galore_adamw: rank: found 0"):
        GaLoreAdamW([{"params": parameters((2, 2)), "rank": 0}])
    with pytest.raises(FrankensteinError, match="galore_adamw: scale: found -1"):
        GaLoreAdamW(parameters((2, 2)), scale=-1.0)
    (p,) = parameters((2, 2))
    p.grad = torch.zeros(2, 2, dtype=torch.float64).to_sparse()
    with pytest.raises(FrankensteinError, match=r"galore_adamw: gradient: found torch\.float64, torch\.sparse_coo"):
        GaLoreAdamW([p], rank=1).step()
