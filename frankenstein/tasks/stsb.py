"""Graded similarity. Source: Cer et al. 2017, https://arxiv.org/abs/1708.00055."""

from frankenstein.tasks.registry import TASKS, Task


@TASKS.register("stsb")
class StsB(Task):
    """How similar are two sentences, from 0 to 5? Source: https://arxiv.org/abs/1708.00055."""

    score_range = (0.0, 5.0)
    targets = (0.0, 1.0)
