"""Turn the pretrained encoder ternary and pack it."""

from pathlib import Path

from frankenstein.params import Params
from stages.runner import run


def main(
    params: Params, *, encoder: Path, tokens: Path, quantized: Path, metrics: Path, curve: Path, resume: Path
) -> None:
    """Turn the pretrained encoder ternary and pack it."""
    from frankenstein.training.ternary import quantize_encoder

    quantize_encoder(
        seed=params.seed,
        threads=params.threads,
        options=params.quantize,
        training_options=params.training,
        encoder=encoder,
        tokens=tokens,
        out=quantized,
        resume=resume,
        metrics=metrics,
        curve=curve,
    )


if __name__ == "__main__":
    run(main)
