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
from frankenstein.training.objective import Objective
from frankenstein.training.processes import ALONE, Processes
from frankenstein.training.row_origins import RowOrigins

# Validation masks do not depend on the run's seed: runs with different seeds are compared on the same positions.
VALIDATION_SEED = 20_260_101
_SAMPLING = 3  # keeps the draws of sampled labels apart from those of order and masking with the same seed


@dataclass(frozen=True)
class MlmBatch:
    """One masked batch; N positions are chosen."""

    inputs: Tensor  # (B, T) int64, with the masks put in
    real: Tensor | None  # (B, T) bool, True = not padding; None when nothing is padding
    positions: Tensor  # (N,) int64, into the flattened (B * T)
    labels: Tensor  # (N,) int64
    tokens: int  # real tokens

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "MlmBatch":
        """The batch whose fields an emergency folder holds by name."""
        names = ("inputs", "positions", "labels")
        return cls(**{name: tensors[name] for name in names}, real=tensors.get("real"), tokens=int(tensors["tokens"]))

    def rows(self, start: int, stop: int) -> "MlmBatch":
        """The batch of these rows alone."""
        length = self.inputs.shape[1]
        here = (self.positions >= start * length) & (self.positions < stop * length)
        inputs, real = self.inputs[start:stop], None if self.real is None else self.real[start:stop]
        return MlmBatch(
            inputs=inputs,
            real=real,
            positions=self.positions[here] - start * length,
            labels=self.labels[here],
            tokens=inputs.numel() if real is None else int(real.sum()),
        )

    def share(self, processes: Processes) -> "MlmBatch":
        """The rows of one of several processes, next to each other; without any, the first row and no position."""
        count, rank, size = len(self.inputs), processes.rank, processes.size
        start, stop = count * rank // size, count * (rank + 1) // size
        if start < stop:
            return self.rows(start, stop)
        none = self.positions[:0]
        return MlmBatch(self.inputs[:1], None if self.real is None else self.real[:1], none, none, 0)


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


def chosen_logits(model: Any, batch: MlmBatch) -> Tensor:
    """Logits (N, V) at the chosen positions; the last feed-forward and the head see only those.

    The batch is moved to the model's device.

    Args:
        model: an encoder; called as model(inputs, mask, positions), with `mlm_logits`.
    """
    device = next(model.parameters()).device
    real = None if batch.real is None else batch.real.to(device, non_blocking=True)
    positions = batch.positions.to(device, non_blocking=True)
    logits: Tensor = model.mlm_logits(model(batch.inputs.to(device, non_blocking=True), real, positions))
    return logits


def mlm_loss(model: Any, batch: MlmBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy and accuracy over the chosen positions. No position gives loss 0."""
    logits = chosen_logits(model, batch)
    labels = batch.labels.to(logits.device, non_blocking=True)
    return _mean_cross_entropy(logits, labels), mlm_values(logits, labels, batch)


def mlm_values(logits: Tensor, labels: Tensor, batch: MlmBatch) -> dict[str, Tensor]:
    """What is logged of a batch: accuracy, and the counts of predicted positions and of tokens, on the CPU."""
    count = len(batch.labels)
    correct = (logits.detach().argmax(-1) == labels).sum()
    return {"accuracy": correct / max(1, count), "terms": torch.tensor(count), "tokens": torch.tensor(batch.tokens)}


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))


def training_loss(model: nn.Module, batch: MlmBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy over the chosen positions, plus the encoder's auxiliary losses."""
    loss, values = mlm_loss(model, batch)
    auxiliary: dict[str, Tensor] = model.losses()  # type: ignore[operator]
    return loss + sum(auxiliary.values()), values


def sampled_loss(model: nn.Module, batch: MlmBatch, seed: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of labels drawn from the model's own softmax; its squared gradient estimates the Hessian.

    Source: Gauss-Newton-Bartlett estimator, Liu et al. 2023 (Sophia), algorithm 2, https://arxiv.org/abs/2305.14342.
    The auxiliary losses are no likelihood and stay out.
    Args:
        seed: what is drawn depends on it alone (and on the kind of device).
    Returns:  the loss, and the values of the true labels, "loss" among them.
    """
    logits = chosen_logits(model, batch)
    generator = torch.Generator(logits.device)
    generator.manual_seed(int(np.random.SeedSequence([_SAMPLING, *seed]).generate_state(1, np.uint64)[0] >> 1))
    with torch.no_grad():
        # The largest p / e with e exponential is a draw from p (Gumbel's trick).
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
        drawn = (logits.float().softmax(-1) / noise).argmax(-1)
        labels = batch.labels.to(logits.device, non_blocking=True)
        values = {"loss": _mean_cross_entropy(logits, labels), **mlm_values(logits, labels, batch)}
    return _mean_cross_entropy(logits, drawn), values


class MlmObjective(Objective):
    """Predict masked tokens of packed rows.

    Args:
        train, valid: rows; `valid` may have none, then nothing is validated.
        pad_id: marks padding.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches in a step.
        eval_batches: most batches in one validation, from the first rows on.
        origins: tells where the training rows come from, for the notes on a step that went wrong.
        processes: share the rows of every batch, also in validation.
    """

    def __init__(  # noqa: PLR0913  every part by its name
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
        origins: RowOrigins | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.train, self.rule, self.pad_id, self.seed = train, rule, pad_id, seed
        self.batch_size, self.accumulation, self.origins = batch_size, accumulation, origins
        self.processes = processes
        count = min(valid.num_rows, eval_batches * batch_size)
        whole = (
            make_batch(valid.take(np.arange(i, min(i + batch_size, count))), rule, pad_id, seed=VALIDATION_SEED, step=i)
            for i in range(0, count, batch_size)
        )
        self.validation = [self.share(batch) if processes.several else batch for batch in whole]

    def batch(self, step: int, micro: int) -> MlmBatch:
        """The masked batch of a step's micro-batch."""
        rows = self.train.take(self._rows(step, micro))
        return make_batch(rows, self.rule, self.pad_id, seed=self.seed, step=self._index(step, micro))

    def share(self, batch: MlmBatch) -> MlmBatch:
        """This process's rows."""
        return batch.share(self.processes)

    def _index(self, step: int, micro: int) -> int:
        return step * self.accumulation + micro

    def _rows(self, step: int, micro: int) -> NDArray[np.int64]:
        index = self._index(step, micro)
        return batch_indices(self.train.num_rows, self.batch_size, seed=self.seed, step=index)

    def loss(self, model: nn.Module, batch: MlmBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over the chosen positions, plus the encoder's auxiliary losses."""
        return training_loss(model, batch)

    def sampled_loss(
        self, model: nn.Module, batch: MlmBatch, seed: tuple[int, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss whose squared gradient estimates the Hessian."""
        return sampled_loss(model, batch, seed)

    def origin(self, step: int, micro: int) -> list[dict[str, Any]]:
        """Row, shard, documents and text of every row of a micro-batch."""
        rows = self._rows(step, micro)
        return [{"row": int(row)} for row in rows] if self.origins is None else self.origins.describe(rows)

    def recipe(self) -> dict[str, Any]:
        """The loss needs nothing but the model."""
        return {"kind": "mlm"}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy over all chosen positions of the fixed batches."""
        loss = accuracy = terms = 0.0
        for batch in self.validation:
            batch_loss, values = mlm_loss(model, batch)
            count = len(batch.labels)
            loss += batch_loss.item() * count
            accuracy += values["accuracy"].item() * count
            terms += count
        loss, accuracy, terms = self.processes.sums([loss, accuracy, terms])
        return {"loss": loss / terms, "accuracy": accuracy / terms} if terms else {}
