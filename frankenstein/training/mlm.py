"""Masked language modelling as an objective of the training loop.

Source: Devlin et al. 2019, section 3.1, https://arxiv.org/abs/1810.04805.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from frankenstein.text.masking import MaskingRule, mask_rows
from frankenstein.text.order import batch_indices
from frankenstein.text.shards import TokenRows
from frankenstein.training.loop import Objective

# Validation masks do not depend on the run's seed: runs with different seeds are compared on the same positions.
VALIDATION_SEED = 20_260_101


@dataclass(frozen=True)
class MlmBatch:
    """One masked batch; N positions are chosen."""

    inputs: Tensor  # (B, T) int64, with the masks put in
    real: Tensor | None  # (B, T) bool, True = not padding; None when nothing is padding
    positions: Tensor  # (N,) int64, into the flattened (B * T)
    labels: Tensor  # (N,) int64
    tokens: int  # real tokens


def make_batch(rows: NDArray[np.int64], rule: MaskingRule, pad_id: int, *, seed: int, step: int) -> MlmBatch:
    """Mask rows (B, T); the positions are known here, so that the device need not be asked for them."""
    inputs, chosen = mask_rows(rows, rule, seed=seed, step=step)
    real = rows != pad_id
    return MlmBatch(
        inputs=torch.from_numpy(inputs),
        real=None if real.all() else torch.from_numpy(real),
        positions=torch.from_numpy(np.flatnonzero(chosen)),
        labels=torch.from_numpy(rows[chosen]),
        tokens=int(real.sum()),
    )


def mlm_loss(model: Any, batch: MlmBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy and accuracy over the chosen positions; the head sees only those. No position gives loss 0.

    Args:
        model: an encoder; called as model(inputs, mask), with `mlm_logits`. The batch is moved to its device.
    """
    device = next(model.parameters()).device
    real = None if batch.real is None else batch.real.to(device, non_blocking=True)
    hidden = model(batch.inputs.to(device, non_blocking=True), real)
    labels = batch.labels.to(device, non_blocking=True)
    logits = model.mlm_logits(hidden.flatten(0, 1).index_select(0, batch.positions.to(device, non_blocking=True)))
    count = len(batch.labels)
    loss = F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, count)
    correct = (logits.detach().argmax(-1) == labels).sum()
    values = {"accuracy": correct / max(1, count), "terms": torch.tensor(count), "tokens": torch.tensor(batch.tokens)}
    return loss, values


class MlmObjective(Objective):
    """Predict masked tokens of packed rows.

    Args:
        train, valid: rows; `valid` may have none, then nothing is validated.
        pad_id: marks padding.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches in a step.
        eval_batches: most batches in one validation, from the first rows on.
    """

    def __init__(
        self,
        train: TokenRows,
        valid: TokenRows,
        rule: MaskingRule,
        pad_id: int,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        eval_batches: int = 8,
    ) -> None:
        self.train, self.rule, self.pad_id, self.seed = train, rule, pad_id, seed
        self.batch_size, self.accumulation = batch_size, accumulation
        count = min(valid.num_rows, eval_batches * batch_size)
        self.validation = [
            make_batch(valid.take(np.arange(i, min(i + batch_size, count))), rule, pad_id, seed=VALIDATION_SEED, step=i)
            for i in range(0, count, batch_size)
        ]

    def batch(self, step: int, micro: int) -> MlmBatch:
        """The masked batch of a step's micro-batch."""
        index = step * self.accumulation + micro
        rows = self.train.take(batch_indices(self.train.num_rows, self.batch_size, seed=self.seed, step=index))
        return make_batch(rows, self.rule, self.pad_id, seed=self.seed, step=index)

    def loss(self, model: nn.Module, batch: MlmBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over the chosen positions, plus the encoder's auxiliary losses."""
        loss, values = mlm_loss(model, batch)
        auxiliary: dict[str, Tensor] = model.losses()  # type: ignore[operator]
        return loss + sum(auxiliary.values()), values

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy over all chosen positions of the fixed batches."""
        loss = accuracy = terms = 0.0
        for batch in self.validation:
            batch_loss, values = mlm_loss(model, batch)
            count = len(batch.labels)
            loss += batch_loss.item() * count
            accuracy += values["accuracy"].item() * count
            terms += count
        return {"loss": loss / terms, "accuracy": accuracy / terms} if terms else {}
