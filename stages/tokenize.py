"""Train the tokenizer and pack the corpus into rows of tokens."""

from pathlib import Path

from frankenstein.params import Params
from stages.runner import run


def main(params: Params, *, cache: Path, tokenizer: Path, tokens: Path, metrics: Path) -> None:
    """Train the tokenizer and pack the corpus into rows of tokens."""
    from frankenstein.artifact import open_folder, write_json
    from frankenstein.text.parquet_folder import cached_texts
    from frankenstein.text.shards import tokenize_corpus
    from frankenstein.text.tokenizer import Tokenizer

    texts = cached_texts(cache, open_folder(cache, "corpus_cache")["shards"])
    trained = Tokenizer.train(
        texts, tokenizer, options=params.tokenizer, vocab_size=params.model.vocab_size, seed=params.seed
    )
    report = tokenize_corpus(
        cache,
        trained,
        max_length=params.training.max_length,
        seed=params.seed,
        out=tokens,
        validation_fraction=params.data.validation_fraction,
        tokens_per_shard=params.tokenizer.tokens_per_shard,
        num_workers=params.training.num_workers,
    )
    write_json(metrics, {"vocab_size": trained.vocab_size, **report})


if __name__ == "__main__":
    run(main)
