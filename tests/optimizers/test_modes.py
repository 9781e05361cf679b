import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from frankenstein.optimizers.adamw import AdamW
from frankenstein.optimizers.modes import averaged_weights, training_weights, wants_hessian
from frankenstein.optimizers.schedulefree_adamw import ScheduleFreeAdamW
from frankenstein.optimizers.sophia import Sophia


def moved(cls: type[Optimizer]) -> tuple[nn.Parameter, Optimizer]:
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = cls([p], lr=0.1)
    for g in ([1.0, 2.0, -1.0], [-0.5, 1.0, 0.1], [0.2, 0.1, 0.3]):
        p.grad = torch.tensor(g)
        optimizer.step()
    return p, optimizer


def test_inside_are_the_averages_and_after_it_the_weights_from_before() -> None:
    p, optimizer = moved(ScheduleFreeAdamW)
    before, z = p.detach().clone(), optimizer.state[p]["z"]
    with averaged_weights(optimizer):
        torch.testing.assert_close(p.data, before + (1 - 1 / 0.9) * (z - before))
        assert not torch.equal(p.data, before)
    assert torch.equal(p.data, before)


def test_an_error_inside_leaves_the_weights_from_before() -> None:
    p, optimizer = moved(ScheduleFreeAdamW)
    before = p.detach().clone()
    with pytest.raises(KeyboardInterrupt), averaged_weights(optimizer):
        raise KeyboardInterrupt
    assert torch.equal(p.data, before)
    optimizer.step()  # and the optimizer goes on


def test_one_inside_another_changes_nothing() -> None:
    p, optimizer = moved(ScheduleFreeAdamW)
    with averaged_weights(optimizer):
        average = p.detach().clone()
        with averaged_weights(optimizer):
            assert torch.equal(p.data, average)
        assert torch.equal(p.data, average)


@pytest.mark.parametrize("cls", [AdamW, Sophia])
def test_optimizers_without_averages_are_left_alone(cls: type[Optimizer]) -> None:
    p, optimizer = moved(cls)
    before = p.detach().clone()
    with averaged_weights(optimizer):
        assert torch.equal(p.data, before)
    training_weights(optimizer)
    assert torch.equal(p.data, before)


def test_training_goes_on_from_a_pair_saved_inside() -> None:
    p, optimizer = moved(ScheduleFreeAdamW)
    with averaged_weights(optimizer):
        weights, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
        q = nn.Parameter(weights)
        resumed = ScheduleFreeAdamW([q])
        resumed.load_state_dict(state)
    training_weights(resumed)
    training_weights(resumed)
    for r, o in ((p, optimizer), (q, resumed)):
        r.grad = torch.ones(3)
        o.step()
    assert torch.equal(p, q)


def test_a_hessian_is_due_in_the_last_of_every_k_steps_and_only_for_methods_that_use_one() -> None:
    p = nn.Parameter(torch.ones(2))
    sophia = Sophia([p], update_k=4)
    assert [step for step in range(12) if wants_hessian(sophia, step)] == [3, 7, 11]
    assert not any(wants_hessian(AdamW([p]), step) for step in range(12))
    assert all(wants_hessian(Sophia([p], update_k=1), step) for step in range(3))
