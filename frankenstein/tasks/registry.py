"""The base class of a sentence-pair task, and the registry of tasks."""

from typing import ClassVar

from frankenstein.registry import Registry


class Task:
    """A sentence-pair task: columns sentence1, sentence2 and `label` (classes) or `score` (graded).

    Class attributes:
        labels: names of the integer labels 0..n-1; empty for a graded task.
        score_range: lowest and highest score of a graded task; None for classes.
        targets: cosine that Siamese training asks of each label (graded tasks: of the lowest and the highest score).
        similar, dissimilar: labels that count as similar and as dissimilar when only the cosine decides; others are
            left out there.
    """

    labels: ClassVar[tuple[str, ...]] = ()
    score_range: ClassVar[tuple[float, float] | None] = None
    targets: ClassVar[tuple[float, ...]]
    similar: ClassVar[int | None] = None
    dissimilar: ClassVar[int | None] = None

    @classmethod
    def column(cls) -> str:
        """Name of the target column: "label" or "score"."""
        return "label" if cls.labels else "score"

    @classmethod
    def cosine_target(cls, value: float) -> float:
        """The cosine in [-1, 1] that Siamese training asks for a label or score."""
        if cls.labels:
            return cls.targets[int(value)]
        assert cls.score_range is not None
        low, high = cls.score_range
        return cls.targets[0] + (cls.targets[1] - cls.targets[0]) * (value - low) / (high - low)


TASKS: Registry[type[Task]] = Registry("task", "frankenstein.tasks")
