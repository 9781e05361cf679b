"""A tokenizer and packed rows of six short documents, again and again."""

from pathlib import Path
from typing import Any

import numpy as np

from frankenstein.artifact import new_folder, write_json
from frankenstein.model.options import ModelOptions
from frankenstein.text.options import TokenizerOptions
from frankenstein.text.shards import SPLITS, RowWriter
from frankenstein.text.tokenizer import Tokenizer
from frankenstein.training.options import OptimizerOptions, TrainingOptions
from frankenstein.training.pretrain import pretrain

DOCUMENTS = [
    "ana canta",
    "beto corre y ana canta y corre y canta y corre",
    "y",
    "ana",
    "beto",
    "canta ana y beto corre",
]
LENGTH, VOCAB = 8, 20
SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "retention_heads": 2, "ffn_hidden_size": 24}


def write_language(folder: Path, copies: int = 4) -> tuple[Tokenizer, list[str]]:
    """Write tokenizer/ and tokens/ (two rows a shard); returns the tokenizer and the documents in order."""
    documents = DOCUMENTS * copies
    options = TokenizerOptions(byte_fallback=False)
    words = Tokenizer.train(DOCUMENTS * 20, folder / "tokenizer", options=options, vocab_size=VOCAB, seed=0)
    stream = np.concatenate([[*words.encode(text), words.sep_id] for text in documents])
    with new_folder(folder / "tokens", "tokens") as temporary:
        splits = {}
        for split in SPLITS:
            writer = RowWriter(temporary, split, words, LENGTH, tokens_per_shard=2 * LENGTH)
            writer.add(stream)
            writer.close()
            splits[split] = {"rows": writer.rows, "shards": writer.shards}
        config = {"max_length": LENGTH, "vocab_size": words.vocab_size, "dtype": "uint16", "splits": splits}
        write_json(temporary / "config.json", config)
    return words, documents


def pretrain_tiny(language: Path, out: Path, *, model: dict[str, Any] | None = None, **training: Any) -> dict[str, Any]:
    """Pretrain two layers on the language; everything is written below `out`."""
    values: dict[str, Any] = {
        "batch_size": 4, "max_length": LENGTH, "scheduler_total_steps": 12, "eval_every_n_steps": 6,
        "checkpoint_every_n_steps": 4, "csv_log_path": str(out / "log.csv"), **training,
    }  # fmt: skip
    values.setdefault("optimizer", OptimizerOptions("adamw", {"adamw-lr": 3e-3}))
    return pretrain(
        seed=0, threads=1, model_options=ModelOptions(vocab_size=VOCAB, **{**SHAPE, **(model or {})}),
        training_options=TrainingOptions(**values), tokens=language / "tokens", tokenizer=language / "tokenizer",
        out=out / "encoder", resume=out / "resume", metrics=out / "metrics.json", curve=out / "curve.csv",
    )  # fmt: skip
