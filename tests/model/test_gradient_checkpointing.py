"""Recomputed activations: the same numbers, the same random choices, each auxiliary loss once, less memory kept."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from frankenstein.mixers.base import Mixer
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 2,
    "num_loops": 2,
    "ffn_hidden_size": 24,
    "dropout": 0.3,
    "use_moe": True,
}


class Counting(Mixer):
    """A mixer whose output and loss depend on the traversal."""

    parameter_group: ClassVar[str] = "attention"

    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.linear, self.calls, self.loss = nn.Linear(width, width), [], torch.zeros(())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.append(self.logical_index)
        y = self.linear(x) * (1 + self.logical_index)
        self.loss = y.square().mean()
        return y

    def losses(self) -> dict[str, Tensor]:
        return {"counting": self.loss}


def build(checkpointing: bool, **values: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(ModelOptions(**{**SMALL, **values, "gradient_checkpointing": checkpointing})).train()


def ids() -> Tensor:
    return torch.arange(5, 35).view(2, 15)


def gradients(model: Encoder) -> tuple[float, list[Tensor]]:
    torch.manual_seed(1)
    mask = torch.arange(15)[None] < torch.tensor([[15], [9]])
    loss = model(ids(), mask).sin().sum() + sum(model.losses().values())
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_are_bit_for_bit_those_of_the_plain_pass_dropout_and_experts_included(autocast) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, recomputed = gradients(build(False)), gradients(build(True))
    assert plain[0] == recomputed[0] and len(plain[1]) == len(recomputed[1])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], recomputed[1], strict=True))


def test_each_traversal_keeps_its_logical_index_and_counts_its_loss_once() -> None:
    results = []
    for checkpointing in (False, True):
        model = build(checkpointing, dropout=0.0, use_moe=False)
        torch.manual_seed(2)
        mixer = Counting(16)
        model.blocks[1].mixer = mixer
        results.append((*gradients(model), model.losses()["counting"]))
        assert mixer.calls == ([1, 3, 3, 1] if checkpointing else [1, 3])
    assert results[0][0] == results[1][0] and torch.equal(results[0][2], results[1][2])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_fewer_activations_are_kept_for_the_backward_pass() -> None:
    kept = []
    for checkpointing in (False, True):
        model, numbers = build(checkpointing), 0

        def count(x: Tensor) -> Tensor:
            nonlocal numbers
            numbers += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model(ids())
        kept.append(numbers)
    assert kept[1] < kept[0] / 4


def test_evaluation_recomputes_nothing() -> None:
    model = build(True).eval()
    mixer = model.blocks[1].mixer = Counting(16)
    model(ids()).sum().backward()
    assert mixer.calls == [1, 3]
