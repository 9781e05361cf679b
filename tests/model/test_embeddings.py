"""Factorized and convolved embeddings, computed again by hand."""

import pytest
import torch
import torch.nn.functional as F

from frankenstein.model.embeddings import EmbeddingStream
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.optimizers.groups import parameter_groups

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_layers": 1, "ffn_hidden_size": 24}
FACTORIZED = {**SMALL, "use_factorized_embedding": True, "factorized_embedding_dim": 6}


def encoder(**values: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(ModelOptions(**values), max_length=32).eval()


def test_a_factorized_table_acts_as_the_product_of_its_factors_in_the_stream_and_in_the_tied_head() -> None:
    model, whole = encoder(**FACTORIZED), encoder(**SMALL)
    table = model.embedding.weight @ model.embedding_stream.projection.weight.T
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("embedding_stream")}
    whole.load_state_dict({**state, "embedding.weight": table})
    ids = torch.arange(5, 17).view(2, 6)
    torch.testing.assert_close(model(ids), whole(ids))
    rows = torch.randn(5, 16)
    torch.testing.assert_close(model.mlm_logits(rows), whole.mlm_logits(rows))


def test_factors_take_less_room_and_start_with_the_same_variance() -> None:
    model = encoder(**{**FACTORIZED, "vocab_size": 3000, "hidden_size": 128, "factorized_embedding_dim": 32})
    assert model.parameter_count()["embedding"] == 3000 * 32 + 32 * 128
    stream = model.embedding_stream(model.embedding(torch.arange(3000)[None]))
    assert stream.std().item() == pytest.approx(0.02, rel=0.1)


def test_an_untied_head_has_its_own_matrix_of_the_encoders_width() -> None:
    model, rows = encoder(**FACTORIZED, tie_embeddings=False), torch.randn(5, 16)
    torch.testing.assert_close(model.mlm_logits(rows), rows @ model.head.output.weight.T)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_convolution_is_a_filter_a_channel_with_a_residual(kernel: int, causal: bool) -> None:
    stream = EmbeddingStream(
        ModelOptions(hidden_size=8, use_embedding_conv=True, embedding_conv_kernel=kernel, causal=causal)
    )
    torch.manual_seed(0)
    torch.nn.init.normal_(stream.conv.weight)
    x = torch.randn(2, 9, 8)
    before = kernel - 1 if causal else kernel // 2
    padded = F.pad(x, (0, 0, before, kernel - 1 - before))
    taps = stream.conv.weight
    assert taps.shape == (8, kernel)
    expected = x + sum(padded[:, j : j + 9] * taps[:, j] for j in range(kernel))
    torch.testing.assert_close(stream(x), expected)


def test_the_convolution_starts_as_the_identity_and_ignores_padding() -> None:
    model = encoder(**SMALL, use_embedding_conv=True, embedding_conv_kernel=3)
    plain = encoder(**SMALL)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "stream" not in k})
    ids = torch.arange(5, 17).view(2, 6)
    assert torch.equal(model(ids), plain(ids))
    stream = model.embedding_stream
    torch.nn.init.normal_(stream.conv.weight)
    x, mask = torch.randn(1, 9, 16), torch.arange(9)[None] < 5
    torch.testing.assert_close(stream(x.masked_fill(~mask[..., None], 9.0), mask)[:, :5], stream(x[:, :5]))


@pytest.mark.parametrize(
    "factorized", [{}, {"use_factorized_embedding": True, "factorized_embedding_dim": 32}], ids=str
)
@pytest.mark.parametrize("norm", ["dynamic_tanh", "derf"])
def test_without_a_norm_a_learned_scalar_brings_the_stream_to_unit_variance(norm: str, factorized: dict) -> None:
    model = encoder(**{**SMALL, **factorized, "vocab_size": 3000, "hidden_size": 64, "norm_type": norm})
    scale = model.embedding_stream.scale
    assert scale.tolist() == [8.0] and scale.requires_grad
    ids = torch.arange(3000)[None]
    stream = model.embedding_stream(model.embedding(ids))
    assert stream.std().item() == pytest.approx(1.0, rel=0.1)
    with torch.no_grad():
        rows, before = torch.randn(5, 64), model.mlm_logits(torch.eye(64))
        scale.mul_(2.0)
        torch.testing.assert_close(model.embedding_stream(model.embedding(ids)), 2 * stream)
        assert torch.equal(model.mlm_logits(torch.eye(64)), before), "the tied head reads the table itself"
    model(ids[:, :9]).mul(rows[0]).sum().backward()
    assert scale.grad is not None and scale.grad.abs().item() > 0
    assert any(scale is member for member in parameter_groups(model)["embeddings"])


def test_with_a_norm_there_is_no_such_scalar() -> None:
    assert encoder(**SMALL, norm_type="layer_norm").embedding_stream.scale is None
