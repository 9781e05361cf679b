"""Paraphrase with high word overlap. Source: Yang et al. 2019, https://arxiv.org/abs/1908.11828."""

from frankenstein.tasks.registry import TASKS, Task


@TASKS.register("pawsx")
class PawsX(Task):
    """Do two sentences of nearly the same words mean the same? Source: https://arxiv.org/abs/1908.11828."""

    labels = ("different", "paraphrase")
    targets = (0.0, 1.0)
    similar, dissimilar = 1, 0
