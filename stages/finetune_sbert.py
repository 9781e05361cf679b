"""Fine-tune the ternary encoder, and its full-precision parent where there is one, into sentence encoders."""

from pathlib import Path

from frankenstein.params import Params
from stages.runner import run


def main(
    params: Params,
    *,
    quantized: Path,
    encoder: Path,
    cache: Path,
    sbert: Path,
    metrics: Path,
    curve: Path,
    resume: Path,
) -> None:
    """Fine-tune the ternary encoder, and its full-precision parent where there is one, into sentence encoders."""
    from frankenstein.sentence.finetune import finetune_sbert

    finetune_sbert(
        quantized=quantized,
        parent_encoder=encoder,
        cache=cache,
        options=params.sbert,
        seed=params.seed,
        threads=params.threads,
        out=sbert,
        metrics=metrics,
        curve=curve,
        resume=resume,
    )


if __name__ == "__main__":
    run(main)
