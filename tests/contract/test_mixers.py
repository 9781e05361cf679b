"""What every registered mixer must keep, whatever it computes."""

import dataclasses
import sys

import pytest
import torch

from frankenstein.errors import FrankensteinError, NotBuiltYetError
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.positions import Rotary
from frankenstein.quantization.convert import convert_to_bitlinear, ternary_layers
from frankenstein.registry import Registry

NAMES = list(MIXERS)
WIDTH, LENGTH = 16, 11


def build(name: str, *, causal: bool = False, max_length: int = 32, dtype: torch.dtype = torch.float32) -> Mixer:
    torch.manual_seed(0)
    context = MixerContext(WIDTH, 4, 2, 0.0, causal, max_length, 0, Rotary())
    return MIXERS[name](context, MIXERS[name].Options()).to(dtype).eval()


def tokens(rows: int = 2, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(5), dtype=dtype)


def influence(mixer: Mixer, x: torch.Tensor) -> torch.Tensor:
    """(B, T, B, T): how strongly each output token, seen through random weights, depends on each input token."""
    x = x.clone().requires_grad_()
    y = mixer(x, None)
    probe = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0].abs().amax(-1) for value in (y @ probe).flatten()]
    return torch.stack(rows).view(*y.shape[:2], *x.shape[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 2, LENGTH, 130])
@pytest.mark.parametrize("name", NAMES)
def test_shape_and_dtype_stay(name: str, length: int, dtype: torch.dtype) -> None:
    x = tokens(length=length, dtype=dtype)
    y = build(name, dtype=dtype)(x, None)
    assert y.shape == x.shape and y.dtype == dtype
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_does_not_change_real_tokens(name: str, causal: bool) -> None:
    mixer, x = build(name, causal=causal), tokens()
    for padding in (1, 4, 140):
        filler = 100.0 * torch.ones(2, padding, WIDTH)
        mask = torch.arange(LENGTH + padding)[None].expand(2, -1) < LENGTH
        padded = mixer(torch.cat([x, filler], 1), mask)
        torch.testing.assert_close(padded[:, :LENGTH], mixer(x, None), rtol=1e-5, atol=1e-5)
        assert torch.isfinite(padded).all()


@pytest.mark.parametrize("name", NAMES)
def test_padding_gets_no_gradient_from_real_tokens(name: str) -> None:
    x = tokens().requires_grad_()
    mask = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [6]])
    build(name)(x, mask)[mask].sin().sum().backward()
    assert x.grad[1, 6:].abs().max() == 0 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_in_a_padded_batch_equals_the_row_alone(name: str) -> None:
    mixer, x = build(name), tokens(rows=3)
    lengths = [LENGTH, 1, 7]
    mask = torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]
    together = mixer(x, mask)
    for row, length in enumerate(lengths):
        alone = mixer(x[row : row + 1, :length], None)
        torch.testing.assert_close(together[row : row + 1, :length], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_examples_do_not_mix_and_information_flows_both_ways(name: str) -> None:
    strength = influence(build(name, dtype=torch.float64), tokens(length=7, dtype=torch.float64))
    assert strength[0, :, 1].max() == 0 and strength[1, :, 0].max() == 0
    assert strength[0, :, 0].min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_causal_encoder_sees_the_past_and_never_the_future(name: str) -> None:
    strength = influence(build(name, causal=True, dtype=torch.float64), tokens(rows=1, length=7, dtype=torch.float64))
    seen = strength[0, :, 0]
    assert seen.triu(1).max() == 0
    assert seen[torch.ones(7, 7).tril().bool()].min() > 0


@pytest.mark.parametrize("name", [n for n in NAMES if MIXERS[n].trainable])
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    mixer = build(name).train()
    mixer(tokens(), None).sin().sum().backward()
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_carries_everything_and_evaluation_is_deterministic(name: str) -> None:
    first, x = build(name), tokens()
    torch.manual_seed(1)
    second = build(name)
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x, None), second(x, None))
    assert torch.equal(first(x, None), first(x, None))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_autocast_stays_close(name: str) -> None:
    mixer, x = build(name), tokens()
    mask = torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [6]])
    with torch.autocast("cpu", torch.bfloat16):
        low = mixer(x, mask)
    full = mixer(x, mask)[mask]
    torch.testing.assert_close(low[mask].float(), full, rtol=0.05, atol=0.03 * full.detach().abs().max().item())


@pytest.mark.parametrize("length", [LENGTH, 600])
@pytest.mark.parametrize("name", [name for name in NAMES if MIXERS[name].trainable])
def test_a_backward_pass_inside_of_autocast_gives_the_same_gradient(name: str, length: int) -> None:
    mixer, x, gradients = build(name).train(), tokens(length=length).requires_grad_(), []
    for inside in (False, True):
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = mixer(x, None).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.02 * gradients[0].abs().max().item())


@pytest.mark.parametrize("name", [name for name in NAMES if MIXERS[name].trainable])
def test_recomputing_activations_changes_no_gradient(name: str) -> None:
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        options = ModelOptions(
            vocab_size=50, hidden_size=WIDTH, num_layers=2, num_loops=2, layer_pattern=(name,), ffn_hidden_size=8,
            dropout=0.1, gradient_checkpointing=recompute,
        )  # fmt: skip
        encoder = Encoder(options, max_length=32).train()
        torch.manual_seed(1)
        mask = torch.arange(20)[None] < torch.tensor([[20], [13]])
        loss = encoder(torch.arange(40).view(2, 20), mask).sin().sum() + sum(encoder.losses().values())
        loss.backward()
        found.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key]), key


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_accepts_any_mask_and_turns_ternary(name: str) -> None:
    torch.manual_seed(0)
    options = ModelOptions(vocab_size=50, hidden_size=WIDTH, num_layers=1, layer_pattern=(name,), ffn_hidden_size=8)
    encoder = Encoder(options, max_length=32).eval()
    torch.nn.init.normal_(encoder.embedding.weight)
    assert_any_mask_works(encoder)
    assert_any_mask_works(convert_to_bitlinear(encoder))
    assert len(ternary_layers(encoder)) >= 3


def assert_any_mask_works(encoder: Encoder) -> None:
    ids = torch.arange(5, 12)[None]
    alone = encoder(ids)[0]
    for places in ([0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8, 9], [0, 2, 3, 5, 6, 8, 9]):
        mask = torch.zeros(2, 10, dtype=torch.int64)
        mask[0, places] = 1
        mask[1] = 1
        padded = torch.full((2, 10), 49)
        padded[0, places] = ids[0]
        hidden = encoder(padded, mask)
        torch.testing.assert_close(hidden[0, places], alone, rtol=1e-5, atol=1e-5)
        assert hidden[mask == 0].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_mixer_says_what_it_is(name: str) -> None:
    cls = MIXERS[name]
    assert issubclass(cls, Mixer)
    assert cls.parameter_group in ("attention", "retnet", "mamba", "ode")
    assert "https://" in f"{sys.modules[cls.__module__].__doc__} {cls.__doc__}"
    assert dataclasses.is_dataclass(cls.Options)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls.Options().anything = 1


def test_unknown_and_announced_names_are_told_apart() -> None:
    with pytest.raises(FrankensteinError, match=r"unknown mixer 'retnett'; known: .*did you mean 'retnet'"):
        MIXERS["retnett"]
    later = Registry("mixer", "frankenstein.mixers", announced=("later_attn",))
    with pytest.raises(NotBuiltYetError, match="mixer 'later_attn' is not built yet; built: "):
        later["later_attn"]
