"""A tiny world: a tokenizer, an untrained encoder in full precision, latent and packed, and a cache with pairs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from frankenstein.artifact import new_folder
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.storage import save_encoder
from frankenstein.quantization.artifact import pack
from frankenstein.quantization.convert import bitnet_config, convert_to_bitlinear
from frankenstein.quantization.embedding import round_embeddings
from frankenstein.text.options import TokenizerOptions
from frankenstein.text.pairs import Pairs, write_pairs
from frankenstein.text.tokenizer import Tokenizer

WHO = ("el perro", "la gata", "un niño", "la doctora", "el panadero", "una vecina")
DOES = ("come", "mira", "busca", "pinta", "no quiere")
WHAT = ("una manzana", "el libro", "la mesa azul", "un reloj", "las flores", "el pan de ayer")
SENTENCES = [f"{who} {does} {what}." for who in WHO for does in DOES for what in WHAT]


@dataclass(frozen=True)
class World:
    """Folders: tokenizer, full (encoder), quantized (latent/ and packed/), cache."""

    tokenizer: Path
    full: Path
    quantized: Path
    cache: Path


def make_world(root: Path) -> World:
    made = World(root / "tokenizer", root / "full", root / "quantized", root / "cache")
    words = Tokenizer.train(SENTENCES, made.tokenizer, options=TokenizerOptions(), vocab_size=300, seed=0)
    save_encoder(encoder(), made.full, tokenizer=words.model_bytes, max_length=32)
    ternary = convert_to_bitlinear(encoder())
    round_embeddings(ternary.embedding)
    latent = made.quantized / "latent"
    save_encoder(ternary, latent, tokenizer=words.model_bytes, max_length=32, bitnet=bitnet_config(ternary))
    pack(ternary, made.quantized / "packed", tokenizer=words.model_bytes, max_length=32)
    write_cache(made.cache)
    return made


def encoder() -> Encoder:
    torch.manual_seed(0)
    options = ModelOptions(
        vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, retention_heads=2, ffn_hidden_size=48
    )
    return Encoder(options, max_length=32).eval()


def toy_pairs(count: int, seed: int) -> Pairs:
    """Two sentences with the same subject score 5, others 0: something an encoder can learn from the words."""
    generator = np.random.default_rng(seed)
    first, second, scores = [], [], []
    for k in range(count):
        subjects = generator.choice(len(WHO), 2, replace=False)
        other = subjects[0] if k % 2 else subjects[1]
        for side, subject in ((first, subjects[0]), (second, other)):
            side.append(f"{WHO[subject]} {generator.choice(DOES)} {generator.choice(WHAT)}.")
        scores.append(5.0 * (k % 2))
    return Pairs([str(k) for k in range(count)], first, second, np.array(scores))


def write_cache(folder: Path) -> None:
    tasks = {"stsb": {"train": 256, "dev": 40}, "pawsx": {"train": 32, "dev": 20}, "inferes": {"dev": 8}}
    config = {"rows": len(SENTENCES), "tasks": tasks}
    with new_folder(folder, "corpus_cache", config) as temporary:
        for task, splits in tasks.items():
            for split, count in splits.items():
                pairs = toy_pairs(count, len(task + split))
                labels = pairs.targets if task == "stsb" else (pairs.targets > 0).astype(np.int64)
                write_pairs(temporary, task, split, Pairs(pairs.ids, pairs.first, pairs.second, labels))
        half = len(SENTENCES) // 2
        for shard, texts in enumerate((SENTENCES[:half], SENTENCES[half:])):
            ids = [f"s{shard}-{k}" for k in range(len(texts))]
            columns = {"id": ids, "text": texts, "source": ["toy"] * len(texts)}
            pq.write_table(pa.table(columns), temporary / f"corpus-{shard:05d}.parquet")
