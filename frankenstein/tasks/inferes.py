"""Spanish inference with negation-based adversaries. Source: Kovatchev and Taulé 2022, https://aclanthology.org/2022.coling-1.340."""

from frankenstein.tasks.registry import TASKS, Task


@TASKS.register("inferes")
class InferES(Task):
    """Natural language inference written in Spanish. Source: https://aclanthology.org/2022.coling-1.340."""

    labels = ("entailment", "neutral", "contradiction")
    targets = (1.0, 0.3, -0.4)
    similar, dissimilar = 0, 2
