"""Options of the evaluation."""

from dataclasses import dataclass

from frankenstein.options import option


@dataclass(frozen=True)
class EvaluateOptions:
    """Which tasks and protocols are scored, and how intervals are drawn."""

    tasks: tuple[str, ...] = option(("xnli", "pawsx", "stsb"), "Tasks that are scored.", minItems=1, uniqueItems=True)
    protocols: tuple[str, ...] = option(
        ("embed", "probe"),
        "embed: cosine, thresholds from dev only; probe: logistic regression on [u, v, |u-v|, u*v].",
        minItems=1,
        uniqueItems=True,
    )
    batch_size: int = option(128, "Sentences in one batch.", minimum=1)
    probe_train_pairs: int = option(2000, "Most training pairs of a probe, chosen by the seed.", minimum=10)
    bootstrap_samples: int = option(1000, "Resamples of the 95 % intervals.", minimum=100)
