"""The packed layers: integers equal in every backend, outputs equal to the training forward, nothing in float."""

import copy

import pytest
import torch
from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.quantization.bitlinear import BitLinear
from frankenstein.quantization.embedding import Int8Embedding, round_embeddings
from frankenstein.quantization.runtime import (
    BACKENDS,
    MAX_IN_FEATURES,
    Backend,
    PackedTernaryLinear,
    choose_backend,
    set_backend,
)


def works(name: str) -> bool:
    try:
        choose_backend(name)
    except FrankensteinError:
        return False
    return True


BUILT = [name for name in sorted(BACKENDS) if works(name)]


def trained_layer(in_features: int, out_features: int, **settings: object) -> BitLinear:
    torch.manual_seed(in_features + out_features)
    layer = BitLinear(in_features, out_features, **settings)
    if layer.norm is not None:
        nn.init.normal_(layer.norm.weight, 1.0, 0.3)
    return layer


@pytest.mark.parametrize("rows", [1, 2, 17, 33])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (13, 7), (64, 24), (129, 130)])
def test_every_backend_gives_the_oracles_integers(rows, k, n):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-127, 128, (rows, k), dtype=torch.int8, generator=generator)
    weight = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=generator)
    expected = x.long() @ weight.long().T
    for name in BUILT:
        got = BACKENDS[name].multiply(x, BACKENDS[name].prepare(weight))
        assert got.dtype in (torch.int32, torch.float32)
        assert torch.equal(got.double(), expected.double()), name


@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_packed_layer_equals_the_training_forward_bit_for_bit(backend, scale, norm, bias):
    layer = trained_layer(130, 37, scale=scale, norm=norm, bias=bias)
    packed = PackedTernaryLinear.from_bitlinear(layer, choose_backend(backend))
    x = torch.randn(3, 9, 130) * torch.tensor([1e-7, 1.0, 1e4])[:, None, None]
    trained = layer(x)
    assert torch.equal(packed(x), trained)
    assert torch.equal(packed(x[1, 4:5]), trained[1, 4:5])


def test_sums_stay_exact_in_float32_at_a_large_width():
    width = 20000
    layer = BitLinear(width, 3, norm=False, bias=False)
    nn.init.constant_(layer.weight, 0.5)
    with torch.no_grad():
        layer.weight[1, ::2] *= -1
    x = torch.full((2, width), 3.0)
    packed = PackedTernaryLinear.from_bitlinear(layer, choose_backend("reference"))
    assert torch.equal(packed(x), layer(x))


def test_a_width_beyond_exact_float32_sums_is_refused():
    with pytest.raises(FrankensteinError, match=f"at most {MAX_IN_FEATURES}"):
        PackedTernaryLinear(
            MAX_IN_FEATURES + 1, 1, bias=False, scale="tensor", norm=False, backend=BACKENDS["reference"]
        )
    assert 127 * MAX_IN_FEATURES < 2**24 <= 127 * (MAX_IN_FEATURES + 1)


def test_a_packed_layer_has_no_float_master():
    packed = PackedTernaryLinear.from_bitlinear(trained_layer(64, 32), choose_backend("reference"))
    assert list(packed.parameters()) == []
    assert {k: (v.dtype, tuple(v.shape)) for k, v in packed.state_dict().items()} == {
        "qweight": (torch.uint8, (32, 16)),
        "scale": (torch.float32, (32,)),
        "bias": (torch.float32, (32,)),
        "norm_weight": (torch.float32, (64,)),
    }
    assert max(b.numel() for b in packed.buffers() if b.is_floating_point()) == 64


def test_backends_are_chosen_by_name_and_reported():
    packed = PackedTernaryLinear.from_bitlinear(trained_layer(8, 8), choose_backend("auto"))
    assert packed.backend in BACKENDS
    set_backend(nn.Sequential(packed), choose_backend("reference"))
    assert packed.backend == "reference" and "backend=reference" in repr(packed)
    with pytest.raises(
        FrankensteinError, match="unknown ternary backend 'cuda'; known: auto, int_mm, onednn, reference"
    ):
        choose_backend("cuda")


def test_a_backend_that_saturates_is_not_used(caplog):
    def saturating(x, weight):
        return (x.to(torch.int32) @ weight.to(torch.int32).T).clamp(-32768, 32767)

    BACKENDS["saturating"] = Backend("saturating", saturating)
    try:
        with pytest.raises(FrankensteinError, match="'saturating' does not work on cpu; use auto or reference"):
            choose_backend("saturating")
    finally:
        del BACKENDS["saturating"]
    assert "computes wrong integers" in caplog.text


def test_other_weights_and_copies_are_prepared_anew():
    backend = choose_backend("auto")
    packed = PackedTernaryLinear.from_bitlinear(trained_layer(32, 16), backend)
    other = PackedTernaryLinear.from_bitlinear(trained_layer(32, 16).requires_grad_(False), backend)
    other.qweight = other.qweight.flip(0)
    x = torch.randn(4, 32)
    before, twin = packed(x), copy.deepcopy(packed)
    assert torch.equal(twin(x), before)
    packed.load_state_dict(other.state_dict())
    packed.unpack()
    set_backend(other, choose_backend("reference"))
    other.unpack()
    assert torch.equal(packed(x), other(x)) and not torch.equal(packed(x), before)
    assert torch.equal(twin(x), before)


def test_a_rounded_embedding_equals_its_int8_form_and_rounding_twice_changes_nothing():
    torch.manual_seed(0)
    embedding = nn.Embedding(300, 48)
    nn.init.normal_(embedding.weight)
    with torch.no_grad():
        embedding.weight[0] = 0.0
        embedding.weight[1] *= 1e-4
    before = embedding.weight.detach().clone()
    round_embeddings(embedding)
    once = embedding.weight.detach().clone()
    packed = Int8Embedding.from_embedding(embedding)
    ids = torch.randint(0, 300, (4, 7))
    assert torch.equal(packed(ids), embedding(ids)) and torch.equal(packed.weight, once)
    round_embeddings(embedding)
    assert torch.equal(embedding.weight, once)
    step = before.abs().amax(1, keepdim=True).clamp_min(1e-5) / 127
    assert bool(((once - before).abs() <= 0.8 * step).all())
