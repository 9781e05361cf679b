"""Embed the first rows of the cached corpus with a fine-tuned sentence encoder."""

from pathlib import Path

from frankenstein.params import Params
from stages.runner import run


def main(params: Params, *, sbert: Path, cache: Path, embeddings: Path) -> None:
    """Embed the first rows of the cached corpus with a fine-tuned sentence encoder."""
    from frankenstein.sentence.export import export_embeddings

    export_embeddings(sbert=sbert, cache=cache, options=params.export, threads=params.threads, out=embeddings)


if __name__ == "__main__":
    run(main)
