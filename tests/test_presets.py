"""The shipped configurations: seed 002, its size on paper (on the meta device), and its pattern at small width."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import frankenstein
from frankenstein import load_params
from frankenstein.model.encoder import Encoder
from frankenstein.quantization.convert import convert_to_bitlinear, ternary_layers
from frankenstein.quantization.embedding import TernaryEmbedding

PRESETS = Path(frankenstein.__file__).parent / "presets"
PRESET, COMPACT = PRESETS / "seed002.yaml", PRESETS / "compact.yaml"
ROOT = Path(__file__).parent.parent
PIPELINE, SHIPPED = ROOT / "dvc.yaml", ROOT / "params.yaml"
D, F, LAYERS, EXPERTS, VOCAB = 1024, 2048, 12, 4, 50_000


def build(overrides: dict | None = None) -> Encoder:
    params = load_params(PRESET, overrides)
    with torch.device("meta"):
        return Encoder(params.model, max_length=params.training.max_length)


def expected_counts() -> dict[str, int]:
    """Tables 1 and 6 of the paper: all but the mixers."""
    return {
        "embedding": VOCAB * D + 1,  # the scalar after the table that dynamic tanh asks for
        "ffn": LAYERS * (EXPERTS * 2 * D * F + EXPERTS * D),
        "norms": (2 * LAYERS + 1) * (2 * D + 1),
        "head": VOCAB,
    }


def test_the_parts_outside_of_the_mixers_are_those_of_the_paper() -> None:
    encoder = build({"model.layer_pattern": ["retnet", "standard_attn"]})
    attention = 2 * D * D + 2 * D * (D // 4)  # four groups of keys and values for 16 heads
    mixers = LAYERS // 2 * (5 * D * D + attention)
    counts = {**expected_counts(), "mixers": mixers}
    assert encoder.parameter_count() == {**counts, "total": sum(counts.values())}


def test_it_turns_ternary_whole_with_its_table() -> None:
    encoder = build({"model.layer_pattern": ["retnet", "standard_attn"]})
    convert_to_bitlinear(encoder, embeddings=True)
    assert len(ternary_layers(encoder)) == LAYERS * (2 + 2 * EXPERTS)
    assert isinstance(encoder.embedding, TernaryEmbedding)


def expected_mixers() -> dict[str, int]:
    """Parameters of one layer: 16 heads of 64 with four groups of keys and values, a scan over 2 D channels."""
    grouped, scan = D * D + 2 * D * (D // 4), 2 * D
    directions = 2 * (64 * scan + scan * 64 + scan + 16 * scan)  # dt down and up, its bias, A: each way its own
    return {
        "retnet": 5 * D * D,
        # attention, memory with its convolution, gate and output, 4 learned tokens, 3 rates a head, two head norms
        "titan_attn": grouped + 3 * D * D + 3 * D * 7 + 2 * D * D + 4 * D + 48 * (D + 1) + 2 * 64,
        # input and gate, convolution of 7 with bias, B and C of 16 states each way, D, output
        "mamba": 2 * D * scan + 8 * scan + 2 * 2 * 16 * scan + directions + scan + scan * D,
        # projections whose weights swing with time by an amplitude and a frequency a row
        "ode": grouped + D * D + 2 * (D + D // 2),
    }


def test_the_whole_model_is_that_of_the_paper_and_its_size_is_known_exactly() -> None:
    params = load_params(PRESET)
    pattern = ("retnet", "titan_attn", "retnet", "mamba", "titan_attn", "ode")
    assert params.model.layer_pattern == pattern
    assert (params.model.num_loops, params.model.ode_steps, params.training.max_length) == (2, 2, 512)
    sizes = expected_mixers()
    counts = {**expected_counts(), "mixers": 2 * sum(sizes[name] for name in pattern)}
    total = sum(counts.values())
    assert build().parameter_count() == {**counts, "total": total}
    # Eq. 53 has 303 M: it takes every mixer for 4 D^2, and those of the methods' own papers are larger.
    assert total == pytest.approx(303e6, rel=0.06)


def keys_of(tree: Any, prefix: str = "") -> set[str]:
    if not isinstance(tree, dict):
        return set()
    return {prefix + key for key in tree}.union(*(keys_of(value, f"{prefix}{key}.") for key, value in tree.items()))


@pytest.mark.parametrize("path", [SHIPPED, COMPACT], ids=lambda path: path.stem)
def test_it_has_every_key_that_the_pipeline_reads(path: Path) -> None:
    text = PIPELINE.read_text(encoding="utf-8")
    stages = yaml.safe_load(text)["stages"].values()
    named = {key for stage in stages for key in stage.get("params", ()) if isinstance(key, str)}
    wanted = named | set(re.findall(r"\$\{([a-z_.]+)\}", text))
    assert {"data.path", "model", "training.max_length"} <= wanted
    assert wanted - keys_of(yaml.safe_load(path.read_text(encoding="utf-8"))) == set()


def test_the_shipped_experiment_is_the_pattern_of_the_paper_at_small_width() -> None:
    params, paper = load_params(SHIPPED), load_params(PRESET)
    for name in ("layer_pattern", "norm_type", "use_moe", "num_experts", "top_k_experts", "use_bitnet", "ode_steps"):
        assert getattr(params.model, name) == getattr(paper.model, name), name
    assert Encoder(params.model, max_length=params.training.max_length).parameter_count()["total"] < 1e6
