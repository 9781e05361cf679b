"""Pretrain the encoder with masked language modelling."""

from pathlib import Path

from frankenstein.params import Params
from stages.runner import run


def main(
    params: Params, *, tokens: Path, tokenizer: Path, encoder: Path, metrics: Path, curve: Path, resume: Path
) -> None:
    """Pretrain the encoder with masked language modelling."""
    from frankenstein.training.pretrain import pretrain

    pretrain(
        seed=params.seed,
        threads=params.threads,
        model_options=params.model,
        training_options=params.training,
        tokens=tokens,
        tokenizer=tokenizer,
        out=encoder,
        resume=resume,
        metrics=metrics,
        curve=curve,
    )


if __name__ == "__main__":
    run(main)
