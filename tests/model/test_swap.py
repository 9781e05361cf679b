import pytest
import torch

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.fasa import FasaAttention, calibrate
from frankenstein.mixers.retnet import MultiScaleRetention
from frankenstein.mixers.sparge import SpargeAttention
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.storage import load_encoder, save_encoder
from frankenstein.model.swap import swap_mixer
from frankenstein.quantization.convert import convert_to_bitlinear, ternary_layers

EXACT = {"sparge_attn": {"cdfthreshd": 1.1}, "fasa_attn": {"n_fac": 64}}


def trained(pattern: tuple[str, ...] = ("standard_attn", "retnet"), **options) -> Encoder:
    """An encoder whose weights are nobody's first values."""
    torch.manual_seed(0)
    settings = ModelOptions(
        vocab_size=40, hidden_size=32, num_layers=3, layer_pattern=pattern, ffn_hidden_size=8, **options
    )
    encoder = Encoder(settings, max_length=64)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder.eval()


def ids_and_mask(length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 40, (2, length), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(length)[None] < torch.tensor([[length], [length - 15]])).long()


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("new", EXACT)
def test_an_exact_sparse_mixer_gives_the_output_of_the_attention_it_replaces(new: str, groups: int | None) -> None:
    encoder = trained(num_kv_heads=groups)
    swapped = swap_mixer(encoder, "standard_attn", new, EXACT[new])
    torch.testing.assert_close(swapped(*ids_and_mask()), encoder(*ids_and_mask()))
    kinds = [type(block.mixer) for block in swapped.blocks]
    sparse = {"sparge_attn": SpargeAttention, "fasa_attn": FasaAttention}[new]
    assert kinds == [sparse, MultiScaleRetention, sparse]
    assert swapped.options.layer_pattern == (new, "retnet") and swapped.options.mixers == {new: EXACT[new]}
    assert not swapped.training


def test_a_sparse_mixer_really_is_sparse_and_the_trained_encoder_stays_as_it_was() -> None:
    encoder = trained().train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state = torch.get_rng_state()
    sparse = {"block_q": 4, "block_k": 4, "simthreshd1": -1.0, "cdfthreshd": 0.5}
    swapped = swap_mixer(encoder, "standard_attn", "sparge_attn", sparse)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(swapped(*ids_and_mask()), encoder.eval()(*ids_and_mask()))
    with torch.no_grad():
        for parameter in swapped.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert encoder.options.layer_pattern == ("standard_attn", "retnet")


def test_buffers_of_the_new_mixer_keep_their_first_values_until_calibrated() -> None:
    swapped = swap_mixer(trained(), "standard_attn", "fasa_attn", {"n_tip": 2, "n_fac": 8})
    assert not swapped.blocks[0].mixer.calibrated
    with pytest.raises(FrankensteinError, match="more than n_fac=8"):
        swapped(*ids_and_mask())
    calibrate(swapped, [ids_and_mask()])
    assert torch.isfinite(swapped(*ids_and_mask())).all()


def test_the_swap_goes_back_and_keeps_the_function() -> None:
    encoder = trained()
    there = swap_mixer(encoder, "standard_attn", "fasa_attn", {"n_tip": 2, "n_fac": 8})
    back = swap_mixer(there, "fasa_attn", "standard_attn")
    assert torch.equal(back(*ids_and_mask()), encoder(*ids_and_mask()))
    assert back.state_dict().keys() == encoder.state_dict().keys()


def test_a_swapped_encoder_is_saved_and_loaded_like_any_other(tmp_path) -> None:
    swapped = swap_mixer(trained(), "standard_attn", "fasa_attn", {"n_tip": 2, "n_fac": 8})
    calibrate(swapped, [ids_and_mask()])
    save_encoder(swapped, tmp_path / "encoder", tokenizer=b"", max_length=64)
    assert torch.equal(load_encoder(tmp_path / "encoder")(*ids_and_mask()), swapped(*ids_and_mask()))


@pytest.mark.parametrize("new", EXACT)
def test_ternary_layers_stay_ternary(new: str) -> None:
    encoder = convert_to_bitlinear(trained()).eval()
    swapped = swap_mixer(encoder, "standard_attn", new, EXACT[new])
    assert list(ternary_layers(swapped)) == list(ternary_layers(encoder))
    torch.testing.assert_close(swapped(*ids_and_mask()), encoder(*ids_and_mask()), rtol=1e-3, atol=1e-3)


def test_looped_layers_of_a_float64_encoder_swap_too() -> None:
    encoder = trained(num_loops=2).double()
    swapped = swap_mixer(encoder, "standard_attn", "sparge_attn", EXACT["sparge_attn"])
    torch.testing.assert_close(swapped(*ids_and_mask()), encoder(*ids_and_mask()))


def test_what_does_not_fit_is_refused_by_name() -> None:
    encoder = trained()
    with pytest.raises(FrankensteinError, match="found no sigmoid_attn in layer_pattern: standard_attn, retnet"):
        swap_mixer(encoder, "sigmoid_attn", "sparge_attn")
    with pytest.raises(FrankensteinError, match="the same mixer"):
        swap_mixer(encoder, "retnet", "retnet_attn")
    with pytest.raises(FrankensteinError, match=r"retnet does not take the weights of standard_attn.*project\.linear"):
        swap_mixer(encoder, "standard_attn", "retnet")
    with pytest.raises(FrankensteinError, match="unknown mixer 'spargle_attn'"):
        swap_mixer(encoder, "standard_attn", "spargle_attn")
    with pytest.raises(FrankensteinError, match=r"model\.mixers\.sparge_attn\.cdf: unknown option"):
        swap_mixer(encoder, "standard_attn", "sparge_attn", {"cdf": 0.5})
    with pytest.raises(FrankensteinError, match=r"model\.positions: none does not work in fasa_attn"):
        swap_mixer(trained(positions="none"), "standard_attn", "fasa_attn")
