"""Siamese fine-tuning as an objective of the shared training loop."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from frankenstein.sentence.losses import pair_loss
from frankenstein.sentence.options import SbertOptions
from frankenstein.sentence.pairs import PairBatch, PairOrder, PairSet
from frankenstein.sentence.pooling import sentence_vectors
from frankenstein.training.loop import Objective


class SiameseObjective(Objective):
    """Both sentences of a pair pass through one encoder; the loss asks a cosine of their vectors.

    Source: Reimers and Gurevych 2019, section 3, https://arxiv.org/abs/1908.10084.
    Args:
        sizes: training pairs of each task, in the order of `train`; a batch has pairs of one task.
        dev: development pairs by task; the score of a task is the Spearman correlation of cosines and targets.
    """

    def __init__(
        self, train: PairSet, sizes: Sequence[int], dev: Mapping[str, PairSet], options: SbertOptions, seed: int
    ) -> None:
        self.train, self.dev, self.options = train, dev, options
        self.order = PairOrder(train.lengths, sizes, options.batch_size, seed)
        self.pair_loss = pair_loss(options.loss)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.options.epochs * self.order.steps_per_epoch

    def batch(self, step: int, micro: int) -> PairBatch:
        """The pairs of a step, one micro-batch; a pure function of the seed and the step."""
        return self.train.batch(self.order.indices(step))

    def loss(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the batch, plus the encoder's auxiliary losses."""
        first, second = self._embed(model, batch)
        loss = self.pair_loss(first, second, batch.targets.to(first.device, non_blocking=True))
        auxiliary: dict[str, Tensor] = model.losses()  # type: ignore[operator]
        return loss + sum(auxiliary.values()), {"tokens": batch.mask.sum()}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss, mean Spearman and Spearman by task on the development pairs; nothing without them."""
        if not self.dev:
            return {}
        scored = {task: self._cosines(model, pairs) for task, pairs in self.dev.items()}
        errors = np.concatenate([(cosines - self.dev[task].targets) ** 2 for task, cosines in scored.items()])
        spearman = {task: rank_correlation(cosines, self.dev[task].targets) for task, cosines in scored.items()}
        mean = sum(spearman.values()) / len(spearman)
        by_task = {f"spearman_{task}": value for task, value in spearman.items()}
        return {"loss": float(errors.mean()), "spearman": mean, **by_task}

    def _embed(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
        device = next(model.parameters()).device
        ids, mask = batch.ids.to(device, non_blocking=True), batch.mask.to(device, non_blocking=True)
        vectors = sentence_vectors(model(ids, mask), mask, self.options.pooling, self.options.normalize)
        first, second = vectors.chunk(2)
        return first, second

    def _cosines(self, model: nn.Module, pairs: PairSet) -> np.ndarray:
        """Cosine of every pair."""
        cosines = np.empty(len(pairs), dtype=np.float32)
        for chosen in pairs.in_order(self.options.batch_size):
            first, second = self._embed(model, pairs.batch(chosen))
            cosines[chosen] = torch.cosine_similarity(first, second).cpu().numpy()
        return cosines


def rank_correlation(values: np.ndarray, targets: np.ndarray) -> float:
    """Spearman correlation with averaged ties; 0 where one side is constant."""
    from scipy.stats import rankdata

    x, y = (ranks - ranks.mean() for ranks in (rankdata(values), rankdata(targets)))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 0.0
