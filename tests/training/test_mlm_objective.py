import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.text.masking import MaskingRule, mask_rows
from frankenstein.text.order import batch_indices
from frankenstein.training.mlm import VALIDATION_SEED, MlmObjective, make_batch, mlm_loss

RULE = MaskingRule(mask_id=4, special_ids=(0, 1, 2, 3, 4), vocab_size=30, probability=0.3)


class Rows:
    """Token rows in memory."""

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.num_rows, self.max_length, self.vocab_size = num_rows, 12, 30
        self.rows = rng.integers(5, 30, (num_rows, 12))
        if num_rows:
            self.rows[:, 0], self.rows[-1, 9:] = 2, 0

    def take(self, indices: np.ndarray) -> np.ndarray:
        return self.rows[indices]


class Tiny(nn.Module):
    """Mean of the real tokens' vectors added to each token; records the masks it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(30, 6), nn.Linear(6, 30)
        self.masks: list[Tensor | None] = []

    def forward(self, ids: Tensor, mask: Tensor | None, at: Tensor | None = None) -> Tensor:
        self.masks.append(mask)
        x = self.embedding(ids)
        real = torch.ones(ids.shape) if mask is None else mask.float()
        x = x + (x * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None]
        return x if at is None else x.flatten(0, 1)[at]

    def mlm_logits(self, rows: Tensor) -> Tensor:
        return self.head(rows)

    def losses(self) -> dict[str, Tensor]:
        return {"balance": torch.tensor(0.25)}


def objective(**changes: object) -> MlmObjective:
    values = {"seed": 3, "batch_size": 4, "eval_batches": 2, **changes}
    return MlmObjective(Rows(10), Rows(6, seed=1), RULE, 0, **values)  # type: ignore[arg-type]


def test_a_batch_is_the_masked_rows_of_its_step_and_micro_batch() -> None:
    batch = objective(accumulation=3).batch(2, 1)
    rows = Rows(10).take(batch_indices(10, 4, seed=3, step=7))
    inputs, chosen = mask_rows(rows, RULE, seed=3, step=7)
    assert torch.equal(batch.inputs, torch.from_numpy(inputs))
    assert batch.labels.tolist() == rows[chosen].tolist()
    assert batch.positions.tolist() == [i for i, c in enumerate(chosen.ravel()) if c]


def test_a_mask_is_given_only_when_there_is_padding() -> None:
    rows = Rows(10).rows
    assert make_batch(rows[:3], RULE, 0, seed=0, step=0).real is None
    padded = make_batch(rows[8:], RULE, 0, seed=0, step=0)
    assert padded.real is not None and padded.real.sum(1).tolist() == [12, 9] and padded.tokens == 21


def test_loss_and_accuracy_are_means_over_the_chosen_positions() -> None:
    model, batch = Tiny(), objective().batch(0, 0)
    loss, values = mlm_loss(model, batch)
    logits = model.head(model(batch.inputs, batch.real)).reshape(-1, 30)[batch.positions]
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.labels))
    assert values["accuracy"].item() == pytest.approx((logits.argmax(1) == batch.labels).double().mean().item())
    assert values["terms"].item() == len(batch.labels) and values["tokens"].item() == batch.tokens


def test_the_training_loss_adds_the_auxiliary_losses_and_validation_does_not() -> None:
    model, task = Tiny(), objective()
    batch = task.batch(0, 0)
    torch.testing.assert_close(task.loss(model, batch)[0], mlm_loss(model, batch)[0] + 0.25)


def test_validation_weighs_every_chosen_position_the_same_on_fixed_masks() -> None:
    model = Tiny()
    values = objective(seed=11).validate(model)
    rows = Rows(6, seed=1).rows
    total = correct = count = 0.0
    for first in (0, 4):
        batch = make_batch(rows[first : first + 4], RULE, 0, seed=VALIDATION_SEED, step=first)
        logits = model.mlm_logits(model(batch.inputs, batch.real).flatten(0, 1)[batch.positions])
        total += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        correct += (logits.argmax(1) == batch.labels).sum().item()
        count += len(batch.labels)
    assert values == pytest.approx({"loss": total / count, "accuracy": correct / count})
    assert objective(seed=12).validate(model) == values
    assert objective(eval_batches=1).validate(model) != values


def test_without_validation_rows_nothing_is_validated() -> None:
    task = MlmObjective(Rows(10), Rows(0), RULE, 0, seed=0, batch_size=4)  # type: ignore[arg-type]
    assert task.validate(Tiny()) == {}


def test_a_batch_without_any_chosen_position_has_loss_zero_and_finite_gradients() -> None:
    model, rows = Tiny(), np.full((2, 12), 2)
    batch = make_batch(rows, RULE, 0, seed=0, step=0)
    assert len(batch.labels) == 0
    loss, values = mlm_loss(model, batch)
    loss.backward()
    assert loss.item() == 0 and values["accuracy"].item() == 0
    assert model.head.weight.grad is not None and torch.equal(model.head.weight.grad, torch.zeros(30, 6))
