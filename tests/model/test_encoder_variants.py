"""What every option of the encoder must keep, whatever it changes: one table of option sets and properties."""

import copy
from pathlib import Path

import pytest
import torch

from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.storage import load_encoder, save_encoder
from frankenstein.optimizers.groups import parameter_groups
from frankenstein.quantization.artifact import load_latent, load_packed, pack
from frankenstein.quantization.convert import bitnet_config, convert_to_bitlinear
from frankenstein.quantization.embedding import round_embeddings

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 4,
    "retention_heads": 2,
    "ffn_hidden_size": 24,
    "layer_pattern": ("standard_attn", "gated_softmax_attn"),
}
FACTORIZED = {"use_factorized_embedding": True, "factorized_embedding_dim": 6}
VARIANTS = {
    "experts": {"use_moe": True},
    "one_expert_a_token": {"use_moe": True, "top_k_experts": 1, "num_experts": 3, "num_loops": 2},
    "factorized": FACTORIZED,
    "factorized_untied": {**FACTORIZED, "tie_embeddings": False},
    "convolution": {"use_embedding_conv": True, "embedding_conv_kernel": 5},
    "grouped_query": {"num_kv_heads": 2},
    "hope": {"positions": "hope", "hope_damping": 0.1},
    "checkpointing": {"gradient_checkpointing": True, "num_loops": 2},
    "hope_in_titans_alone": {"use_hope": True, "layer_pattern": ("titan_attn", "retnet")},
    "seed002": {
        "layer_pattern": ("retnet", "titan_attn", "mamba", "ode"),
        "num_layers": 4,
        "num_loops": 2,
        "num_kv_heads": 2,
        "use_moe": True,
        "norm_type": "dynamic_tanh",
        "gradient_checkpointing": True,
    },
    "all": {
        **FACTORIZED,
        "use_moe": True,
        "use_embedding_conv": True,
        "num_kv_heads": 1,
        "positions": "hope",
        "gradient_checkpointing": True,
        "norm_type": "dynamic_tanh",
        "num_loops": 2,
    },
}
each = pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)


def build(values: dict, *, causal: bool = False) -> Encoder:
    """Weights larger than the initialization, so that every part shows in the output."""
    torch.manual_seed(0)
    encoder = Encoder(ModelOptions(**{**SMALL, **values, "causal": causal}), max_length=24)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.eval()


def ids(rows: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(5, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    return ids(), torch.arange(9)[None] < torch.tensor([[9], [1], [6]])


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@each
def test_a_row_is_the_same_alone_in_a_batch_and_wherever_its_padding_stands(values: dict, causal: bool) -> None:
    encoder, (rows, mask) = build(values, causal=causal), ragged()
    together = encoder(rows, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = encoder(rows[row : row + 1, :length])[0]
        torch.testing.assert_close(together[row, :length], alone, rtol=1e-5, atol=1e-5)
        places = torch.arange(length) * 2 + 1
        scattered = torch.full((1, 20), 3)
        scattered[0, places] = rows[row, :length]
        holes = torch.zeros(1, 20, dtype=torch.bool)
        holes[0, places] = True
        torch.testing.assert_close(encoder(scattered, holes)[0, places], alone, rtol=1e-5, atol=1e-5)
    assert together[~mask].abs().max() == 0


@each
def test_a_causal_encoder_never_sees_the_future_and_the_other_one_does(values: dict) -> None:
    rows = ids(1)
    changed = rows.clone()
    changed[0, 5:] = 7
    for causal in (True, False):
        encoder = build(values, causal=causal)
        moved = (encoder(rows) - encoder(changed)).abs().amax(-1)[0, :5]
        # The last bits may depend on how many tokens an expert gets.
        assert moved.max() < 1e-6 if causal else moved.min() > 1e-5


@each
def test_every_parameter_gets_a_finite_gradient(values: dict) -> None:
    encoder, (rows, mask) = build(values).train(), ragged()
    logits = encoder.mlm_logits(encoder(rows, mask)[mask])
    (logits.sin().sum() + sum(encoder.losses().values())).backward()
    loads = encoder.expert_stats().get("load", torch.ones(len(encoder.blocks), 1))
    loads = loads.unflatten(0, (-1, len(encoder.blocks))).sum(0)
    idle = {f"blocks.{block}.ffn.experts.{expert}." for block, expert in (loads == 0).nonzero().tolist()}
    assert len(idle) < 4
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert bool(parameter.grad.any()) is not name.startswith(tuple(idle)), name


@each
def test_saved_and_loaded_it_is_the_same_and_a_trained_one_can_be_copied(values: dict, tmp_path: Path) -> None:
    encoder, (rows, mask) = build(values), ragged()
    save_encoder(encoder, tmp_path / "encoder", tokenizer=b"", max_length=24)
    loaded = load_encoder(tmp_path / "encoder")
    hidden = encoder(rows, mask)
    assert torch.equal(loaded(rows, mask), hidden) and loaded.options == encoder.options
    assert torch.equal(loaded.mlm_logits(hidden[mask]), encoder.mlm_logits(hidden[mask]))
    loaded.train()(rows, mask)
    assert torch.equal(copy.deepcopy(loaded).eval()(rows, mask), hidden)


@pytest.mark.parametrize("embeddings", ["int8", "float32", "ternary"])
@each
def test_ternary_it_packs_without_any_difference(values: dict, embeddings: str, tmp_path: Path) -> None:
    encoder = convert_to_bitlinear(build(values), embeddings=embeddings == "ternary")
    rows, mask = ragged()
    encoder.train()
    logits = encoder.mlm_logits(encoder(rows, mask)[mask])
    logits.sin().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    if embeddings == "int8":
        round_embeddings(encoder.embedding)
    encoder.eval()
    pack(encoder, tmp_path / "packed", embeddings=embeddings)
    packed = load_packed(tmp_path / "packed")
    with torch.no_grad():
        expected = encoder(rows, mask)
        assert torch.equal(packed(rows, mask), expected)
        assert torch.equal(packed.mlm_logits(expected[mask]), encoder.mlm_logits(expected[mask]))
    save_encoder(encoder, tmp_path / "latent", tokenizer=b"", max_length=24, bitnet=bitnet_config(encoder))
    assert torch.equal(load_latent(tmp_path / "latent")(rows, mask), expected)


@each
def test_all_parameters_are_counted_by_part_and_have_a_group(values: dict) -> None:
    encoder = build(values)
    counts = encoder.parameter_count()
    assert counts["total"] == sum(p.numel() for p in encoder.parameters())
    groups = parameter_groups(encoder)
    sizes = {name: sum(p.numel() for p in members) for name, members in groups.items()}
    assert sizes["embeddings"] == counts["embedding"] + counts["head"]
    assert sizes["other"] == counts["ffn"]
    mixing = [size for name, size in sizes.items() if name not in ("embeddings", "other")]  # norms stand in mixers too
    assert sum(mixing) == counts["mixers"] + counts["norms"]


@each
def test_bfloat16_autocast_stays_close_and_trains(values: dict) -> None:
    encoder, (rows, mask) = build(values).train(), ragged()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = encoder(rows, mask)
        loss = encoder.mlm_logits(hidden[mask]).float().square().mean() + sum(encoder.losses().values())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    # A token close to the border between two experts may go to the other one: compare most of them.
    difference = (hidden.float() - encoder(rows, mask)).abs().amax(-1)[mask]
    assert difference.median() < 0.1
