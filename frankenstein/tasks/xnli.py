"""Natural language inference. Source: Conneau et al. 2018, https://arxiv.org/abs/1809.05053."""

from frankenstein.tasks.registry import TASKS, Task


@TASKS.register("xnli")
class Xnli(Task):
    """Does sentence1 (premise) entail sentence2 (hypothesis)? Source: https://arxiv.org/abs/1809.05053."""

    labels = ("entailment", "neutral", "contradiction")
    targets = (1.0, 0.3, -0.4)
    similar, dissimilar = 0, 2
