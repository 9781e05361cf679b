"""The first module that goes wrong is named, forward and backward, and looking changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from frankenstein.mixers.base import MIXERS
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.quantization.convert import convert_to_bitlinear
from frankenstein.training.inspection import Inspection, describe, inspect_step
from frankenstein.training.mlm import MlmBatch, training_loss
from frankenstein.training.precision import Precision

CPU = Precision(torch.device("cpu"), amp=False, dtype="bfloat16")


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def mean_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return model(batch).square().mean(), {}


def look(model: nn.Module, *batches: Tensor, loss: Any = mean_loss) -> Inspection:
    return inspect_step(model, batches or (torch.ones(2, 3),), loss, CPU)


def test_the_innermost_module_with_a_bad_output_is_named() -> None:
    inner = nn.Sequential(nn.Linear(3, 3), Apply(lambda x: torch.log(x * 0 - 1)), nn.Linear(3, 3))
    seen = look(nn.Sequential(nn.Linear(3, 3), inner, nn.Tanh()))
    assert seen.first_bad == {
        "module": "1.1", "type": "Apply", "micro_batch": 0, "call": 1, "what": "output",
        "not_finite": 6, "of": 6, "input_finite": True, "weights_finite": True,
    }  # fmt: skip
    assert describe(seen.first_bad) == (
        "1.1 (Apply), output of call 1: 6 of 6 values not finite, input finite, own weights finite"
    )


def test_what_a_module_computes_between_its_parts_is_its_own() -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)) / 0

    seen = look(nn.Sequential(Divides(), nn.Linear(3, 3)))
    assert seen.first_bad is not None and (seen.first_bad["module"], seen.first_bad["type"]) == ("0", "Divides")


def test_bad_weights_are_told_from_bad_inputs() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.inf
    seen = look(model)
    assert seen.first_bad is not None
    assert (seen.first_bad["module"], seen.first_bad["weights_finite"]) == ("1", False)
    model = nn.Sequential(nn.Linear(3, 3))
    seen = look(model, torch.full((2, 3), torch.nan))
    assert seen.first_bad is not None and seen.first_bad["input_finite"] is False


def test_a_bad_gradient_is_traced_to_the_module_whose_output_gradient_was_fine() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Apply(lambda x: (x * 0).sqrt()), nn.Linear(3, 3), nn.Tanh())
    seen = look(model)
    assert seen.loss == pytest.approx(seen.loss) and seen.first_bad is not None
    assert (seen.first_bad["module"], seen.first_bad["what"]) == ("1", "gradient of the input")
    assert seen.gradients_not_finite == ["0.weight", "0.bias"]
    assert {name for name, _ in seen.largest} == {"2.weight", "2.bias"}


def test_a_bad_gradient_that_a_module_makes_between_its_parts_is_its_own() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((self.first(x) * 0).sqrt())

    seen = look(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Identity(), Between()), nn.Linear(3, 3)))
    assert seen.first_bad is not None
    found = seen.first_bad
    assert (found["module"], found["type"], found["what"]) == ("1.1", "Between", "gradient of the input")


def test_a_bad_gradient_of_weights_alone_is_found() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.sqrt()

    seen = look(nn.Sequential(Root(), nn.Linear(3, 3)))
    assert seen.first_bad is not None
    assert (seen.first_bad["module"], seen.first_bad["what"]) == ("0", "gradient of the weights")


def test_what_follows_the_model_is_told_from_the_model() -> None:
    seen = look(nn.Linear(3, 3), loss=lambda model, x: ((model(x) * 0).abs().sqrt().sum(), {}))
    assert seen.first_bad is not None
    assert (seen.first_bad["module"], seen.first_bad["what"]) == ("Linear", "gradient of the output")
    seen = look(nn.Linear(3, 3), loss=lambda model, x: (model(x).mean() * torch.nan, {}))
    assert seen.first_bad == {"module": None, "what": "loss"} and describe(seen.first_bad) == "the loss"


def test_the_micro_batch_and_the_traversal_of_a_looped_layer_are_counted() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Apply(torch.log)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x))

    model = nn.Sequential(Looped(), nn.Linear(3, 3))
    seen = look(model, torch.full((2, 3), 5.0), torch.full((2, 3), 0.5), torch.full((2, 3), -1.0))
    assert seen.first_bad is not None
    found = seen.first_bad
    assert (found["module"], found["micro_batch"], found["call"]) == ("0.inner", 1, 2)


def test_buffers_stay_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    look(model, torch.randn(4, 3))
    assert model[0].num_batches_tracked == 0 and torch.equal(model[0].running_mean, torch.zeros(3))


def test_exploding_gradients_are_listed() -> None:
    seen = look(nn.Sequential(nn.Linear(3, 3), Apply(lambda x: x * 1e4)))
    assert seen.finite and describe(seen.first_bad) == "nothing that is not finite"
    assert seen.gradients_above_1000 == ["0.weight", "0.bias"]
    assert seen.largest[0][1] <= seen.gradient_norm


SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "retention_heads": 2, "ffn_hidden_size": 24}


def batch() -> MlmBatch:
    torch.manual_seed(1)
    ids, positions = torch.randint(5, 30, (2, 12)), torch.tensor([1, 5, 14])
    real = torch.arange(12) < torch.tensor([12, 9])[:, None]
    return MlmBatch(ids, real, positions, ids.flatten()[positions], 21)


@pytest.mark.parametrize("name", [name for name in MIXERS if MIXERS[name].trainable])
def test_looking_at_an_encoder_changes_no_gradient_and_finds_nothing(name: str) -> None:
    torch.manual_seed(0)
    options = ModelOptions(vocab_size=30, layer_pattern=(name,), gradient_checkpointing=name == "gla_attn", **SHAPE)
    model = Encoder(options, max_length=12).train()
    if name == "retnet":
        convert_to_bitlinear(model)
    state = torch.get_rng_state()
    training_loss(model, batch())[0].backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.set_rng_state(state)
    seen = inspect_step(model, [batch()], training_loss, CPU)
    assert seen.finite, seen
    for n, p in model.named_parameters():
        assert (p.grad is None) == (n not in wanted) and (p.grad is None or torch.equal(p.grad, wanted[n])), n
    assert not any(module._forward_hooks for module in model.modules())
