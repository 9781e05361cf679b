"""Siamese fine-tuning as an objective of the shared training loop."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from frankenstein.model.encoder import Encoder
from frankenstein.sentence.losses import pair_loss
from frankenstein.sentence.options import SbertOptions
from frankenstein.sentence.pairs import PairBatch, PairOrder, PairSet
from frankenstein.sentence.pooling import sentence_vectors
from frankenstein.training.accumulation import Loss
from frankenstein.training.loop import Objective
from frankenstein.training.replay import Recipe

KIND = "sentence pairs"


class Vectors(NamedTuple):
    """How sentence vectors are made of token vectors, and the name of the loss on pairs of them."""

    loss: str
    pooling: str
    normalize: bool


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
        pair_loss(options.loss)  # a name that is not built stops here, before any work
        self.vectors = Vectors(options.loss, options.pooling, options.normalize)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.options.epochs * self.order.steps_per_epoch

    def batch(self, step: int, micro: int) -> PairBatch:
        """The pairs of a step, one micro-batch; a pure function of the seed and the step."""
        return self.train.batch(self.order.indices(step))

    def loss(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the batch, plus the encoder's auxiliary losses."""
        return siamese_loss(model, batch, self.vectors)

    def origin(self, step: int, micro: int) -> list[dict[str, Any]]:
        """Place among the training pairs, id, sentences and wanted cosine of every pair of a step."""
        return [{"row": int(i), **self.train.describe(int(i))} for i in self.order.indices(step)]

    def recipe(self) -> dict[str, Any]:
        """All that the loss of a batch depends on."""
        return {"kind": KIND, **self.vectors._asdict()}

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

    def _cosines(self, model: nn.Module, pairs: PairSet) -> np.ndarray:
        """Cosine of every pair."""
        cosines = np.empty(len(pairs), dtype=np.float32)
        for chosen in pairs.in_order(self.options.batch_size):
            first, second = _embed(model, pairs.batch(chosen), self.vectors)
            cosines[chosen] = torch.cosine_similarity(first, second).cpu().numpy()
        return cosines


def siamese_loss(model: nn.Module, batch: PairBatch, settings: Vectors) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss of the batch, plus the encoder's auxiliary losses; and values to log."""
    first, second = _embed(model, batch, settings)
    loss = pair_loss(settings.loss)(first, second, batch.targets.to(first.device, non_blocking=True))
    auxiliary: dict[str, Tensor] = model.losses()  # type: ignore[operator]
    return loss + sum(auxiliary.values()), {"tokens": batch.mask.sum()}


def _embed(model: nn.Module, batch: PairBatch, settings: Vectors) -> tuple[Tensor, Tensor]:
    """Vectors (n, D) of the first and of the second sentences."""
    device = next(model.parameters()).device
    ids, mask = batch.ids.to(device, non_blocking=True), batch.mask.to(device, non_blocking=True)
    first, second = sentence_vectors(model(ids, mask), mask, settings.pooling, settings.normalize).chunk(2)
    return first, second


def _replayed(config: dict[str, Any], model: Encoder, device: torch.device) -> Loss:
    """The loss that an emergency folder describes."""
    settings = Vectors(**{name: config["objective"][name] for name in Vectors._fields})
    return partial(siamese_loss, settings=settings)


RECIPES = {KIND: Recipe(lambda tensors: PairBatch(**tensors), _replayed)}  # for `training.replay`


def rank_correlation(values: np.ndarray, targets: np.ndarray) -> float:
    """Spearman correlation with averaged ties; 0 where one side is constant."""
    from scipy.stats import rankdata

    x, y = (ranks - ranks.mean() for ranks in (rankdata(values), rankdata(targets)))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 0.0
