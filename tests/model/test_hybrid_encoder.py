import math

import pytest
import torch
import torch.nn.functional as F

from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder, build_encoder
from frankenstein.model.options import ModelOptions
from frankenstein.params import load_params

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_layers": 3, "ffn_hidden_size": 24}


def encoder(**values: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(ModelOptions(**{**SMALL, **values}), max_length=32).eval()


def ids(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(5, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def test_the_pattern_is_cycled_over_the_layers() -> None:
    model = encoder(layer_pattern=("retnet", "sigmoid_attn"))
    names = [type(block.mixer).__name__ for block in model.blocks]
    assert names == ["MultiScaleRetention", "SigmoidAttention", "MultiScaleRetention"]


def test_the_layers_compose_as_the_paper_says_and_loops_repeat_them() -> None:
    model = encoder(num_loops=2)
    x = F.embedding(ids(), model.embedding.weight)
    for block in [*model.blocks, *model.blocks]:
        x = x + block.mixer(block.mixer_norm(x), None)
        inner = F.gelu(block.ffn.up(block.ffn_norm(x)))
        x = x + block.ffn.out(inner)
    torch.testing.assert_close(model(ids()), model.final_norm(x))
    assert model.parameter_count() == encoder(num_loops=1).parameter_count()


@pytest.mark.parametrize("pattern", ["retnet", "standard_attn"])
def test_the_place_of_the_padding_never_matters(pattern: str) -> None:
    model, row = encoder(layer_pattern=(pattern,)), ids(1, 6)
    alone = model(row)[0]
    for places in ([0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9], [1, 2, 4, 5, 7, 9]):
        for mask_dtype in (torch.bool, torch.int64, torch.float32):
            mask = torch.zeros(1, 10, dtype=mask_dtype)
            mask[0, places] = 1
            padded = torch.zeros(1, 10, dtype=torch.int64)
            padded[0, places] = row[0]
            hidden = model(padded, mask)
            torch.testing.assert_close(hidden[0, places], alone, rtol=1e-5, atol=1e-5)
            assert hidden[0, mask[0] == 0].abs().max() == 0


def test_a_full_mask_is_the_same_as_none() -> None:
    model = encoder()
    assert torch.equal(model(ids(), torch.ones(2, 9)), model(ids()))


def test_rows_without_any_token_are_zero_and_harmless() -> None:
    model = encoder().train()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    hidden = model(ids(3), mask)
    assert hidden[1].abs().max() == 0
    torch.testing.assert_close(hidden[[0, 2]], model(ids(3)[[0, 2]]), rtol=1e-5, atol=1e-5)
    hidden.sin().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model(ids(3), torch.zeros(3, 9)).abs().max() == 0


def test_order_matters_only_through_positions() -> None:
    row = ids(1, 6)
    with_positions = encoder(layer_pattern=("standard_attn",))
    without = encoder(layer_pattern=("standard_attn",), positions="none")
    torch.testing.assert_close(without(row.flip(1)).flip(1), without(row), rtol=1e-5, atol=1e-5)
    assert (with_positions(row.flip(1)).flip(1) - with_positions(row)).abs().max() > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_chosen_rows(tied: bool) -> None:
    model = encoder(tie_embeddings=tied)
    torch.nn.init.normal_(model.head.bias)
    rows = model(ids())[torch.tensor([[True] * 2 + [False] * 7] * 2)]
    matrix = model.embedding.weight if tied else model.head.output.weight
    torch.testing.assert_close(model.mlm_logits(rows), rows @ matrix.T + model.head.bias)
    assert model.parameter_count()["head"] == 40 + (0 if tied else 40 * 16)


@pytest.mark.parametrize("options", [{"num_loops": 2}, {"use_moe": True, "num_experts": 2, "top_k_experts": 1}])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_vectors_of_chosen_tokens_are_those_of_the_whole_with_the_same_gradients(
    options: dict, recompute: bool, padded: bool
) -> None:
    model = encoder(layer_pattern=("retnet", "standard_attn"), gradient_checkpointing=recompute, **options).double()
    rows, mask = ids(3, 9), torch.ones(3, 9, dtype=torch.bool)
    if padded:
        mask[0, 0], mask[0, 5], mask[1, 4:] = False, False, False
    at = torch.tensor([1, 2, 9 + 3, 18, 18 + 8])
    found = model(rows, mask, at)
    losses = model.losses()
    (found.sin().sum() + sum(losses.values())).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    wanted = model(rows, mask).flatten(0, 1)[at]
    (wanted.sin().sum() + sum(model.losses().values())).backward()
    torch.testing.assert_close(found, wanted)
    assert losses == model.losses()
    torch.testing.assert_close(gradients, {name: p.grad for name, p in model.named_parameters()})


def test_only_the_last_feed_forward_is_spared_the_other_tokens() -> None:
    model, seen = encoder(num_loops=2), []
    for block in model.blocks:
        block.ffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    model(ids(2, 9), None, torch.tensor([0, 17]))
    assert seen == [18] * (len(seen) - 1) + [2] and len(seen) == 2 * len(model.blocks)


def test_parts_add_up_to_all_parameters() -> None:
    model = encoder(layer_pattern=("retnet", "standard_attn", "gated_softmax_attn"))
    counts = model.parameter_count()
    assert counts["embedding"] == 40 * 16
    assert counts["mixers"] == (5 + 4 + 5) * 16 * 16
    assert counts["ffn"] == 3 * 2 * 16 * 24
    assert counts["norms"] == 7 * 16
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert model.losses() == {}


def test_residual_outputs_start_smaller_with_logical_depth() -> None:
    torch.manual_seed(0)
    model = Encoder(ModelOptions(vocab_size=500, num_layers=4, num_loops=2))
    for block in model.blocks:
        assert block.mixer.project.linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.ffn.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
        for layer in (block.mixer.out, block.ffn.out):
            assert layer.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_dropout_acts_in_training_only() -> None:
    model = encoder(dropout=0.5)
    assert torch.equal(model(ids()), model(ids()))
    model.train()
    assert not torch.equal(model(ids()), model(ids()))


def test_bfloat16_autocast_trains_without_warnings() -> None:
    model = encoder(layer_pattern=("retnet", "sigmoid_attn", "gated_softmax_attn")).train()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(ids())
        loss = model.mlm_logits(hidden.flatten(0, 1)).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    torch.testing.assert_close(hidden.float(), model(ids()), rtol=0.05, atol=0.05)


def test_build_encoder_is_seeded_and_leaves_the_global_state_alone() -> None:
    size = {"model.hidden_size": 16, "model.vocab_size": 300, "model.num_layers": 1, "training.max_length": 24}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = build_encoder(load_params(overrides={"seed": 3, **size}))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = build_encoder(load_params(overrides={"seed": 3, **size}))
    other = build_encoder(load_params(overrides={"seed": 4, **size}))
    weights = [m.embedding.weight for m in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.max_length == 24


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_heads": 3}, FrankensteinError, "model.num_heads: hidden_size=16 is not a multiple of num_heads=3"),
        (
            {"layer_pattern": ("retnet_atn",)},
            FrankensteinError,
            "unknown mixer 'retnet_atn'.*did you mean 'retnet_attn'",
        ),
        ({"norm_type": "rmsnorm"}, FrankensteinError, "unknown norm 'rmsnorm'"),
        ({"num_kv_heads": 3}, FrankensteinError, "model.num_kv_heads: num_heads=4 is not a multiple of num_kv_heads=3"),
        (
            {"positions": "hope"},
            FrankensteinError,
            "model.positions: hope does not work in retnet of the layer_pattern; .*, standard_attn",
        ),
        ({"use_hope": True}, FrankensteinError, "model.use_hope: needs titan_attn in the layer_pattern; found retnet"),
        ({"mixers": {"retnet": {"decai": "official"}}}, FrankensteinError, "model.mixers.retnet.decai: .*'decay'"),
        ({"mixers": {"retnett": {}}}, FrankensteinError, "unknown mixer 'retnett'"),
    ],
)
def test_wrong_options_are_named(values: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encoder(**values)


def test_a_mask_of_another_shape_is_named() -> None:
    with pytest.raises(
        FrankensteinError, match=r"attention_mask has shape \(2, 8\); expected that of input_ids, \(2, 9\)"
    ):
        encoder()(ids(), torch.ones(2, 8))


def test_mixer_options_reach_the_mixer() -> None:
    model = encoder(layer_pattern=("retnet",), mixers={"retnet": {"chunk_size": 4, "decay": "linspace"}})
    assert model.blocks[0].mixer.chunk_size == 4
    whole = encoder(layer_pattern=("retnet",), mixers={"retnet": {"decay": "linspace"}})
    torch.testing.assert_close(model(ids()), whole(ids()), rtol=1e-5, atol=1e-5)
