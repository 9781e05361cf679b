import pytest
import torch
import torch.nn.functional as F

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.delta_rule import gated_delta_rule_recurrent
from frankenstein.mixers.gated_deltanet import GatedDeltaNet

F64 = torch.float64


def layer(*, causal: bool = False, hidden: int = 8, **options: object) -> GatedDeltaNet:
    torch.manual_seed(0)
    context = MixerContext(hidden, 2, 2, 0.0, causal, 16, 0, None)
    return GatedDeltaNet(context, GatedDeltaNet.Options(**options)).double()


def tokens() -> torch.Tensor:
    return torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1), dtype=F64)


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_the_layer_follows_the_authors_equation(causal: bool) -> None:
    mixer, x = layer(causal=causal, separate_directions=not causal), tokens()
    for linear in (mixer.project.linear, mixer.gate, mixer.out):
        torch.nn.init.normal_(linear.weight, std=0.7)
    torch.nn.init.normal_(mixer.gates)
    torch.nn.init.normal_(mixer.norm.weight)
    q, k, v = F.silu(mixer.project.conv(x @ mixer.project.linear.weight.T)).split((6, 6, 12), -1)
    q, k, v = q.unflatten(-1, (2, 3)), k.unflatten(-1, (2, 3)), v.unflatten(-1, (2, 6))
    q, k = (a / (a.square().sum(-1, keepdim=True) + 1e-6).sqrt() for a in (q, k))
    gates = x @ mixer.gates.T

    def gate(direction: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = gates[..., 4 * direction : 4 * direction + 4].chunk(2, -1)
        softplus = (1 + (a + mixer.dt_bias[direction]).exp()).log()
        return -mixer.A_log[direction].exp() * softplus, 1 / (1 + (-b).exp())

    o, _ = gated_delta_rule_recurrent(q, k, v, *gate(0))
    if not causal:
        backward, _ = gated_delta_rule_recurrent(*(a.flip(1) for a in (q, k, v, *gate(1))))
        alone = 3**-0.5 * (gate(0)[1] * (q * k).sum(-1))[..., None] * v
        o = o + backward.flip(1) - alone
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    swish = x @ mixer.gate.weight.T
    expected = (o.flatten(2) * swish * swish.sigmoid()) @ mixer.out.weight.T
    torch.testing.assert_close(mixer(x), expected)


def test_decays_start_where_mamba_2_starts_them() -> None:
    mixer = layer(hidden=512, head_dim=2)
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() >= 0.001 - 1e-9 and dt.max() <= 0.1 + 1e-9
    assert torch.isfinite(mixer.A_log).all() and mixer.A_log.exp().max() <= 16


def test_heads_take_three_quarters_of_the_width_and_values_twice_that() -> None:
    assert layer(hidden=64).project.widths == (2 * 48, 96)
    assert layer(hidden=64, head_dim=10, expand_v=1.5).project.widths == (2 * 20, 30)


def test_options_change_what_they_say() -> None:
    x = tokens()
    for name, value in {"conv_size": 0, "use_gate": False, "allow_neg_eigval": True}.items():
        mixer, known = layer(**{name: value}), layer()
        known.load_state_dict(mixer.state_dict(), strict=False)
        assert mixer(x).shape == x.shape
        assert not torch.allclose(mixer(x), known(x)), name


def test_a_biased_convolution_writes_nothing_at_padding() -> None:
    mixer, x = layer(conv_bias=True), tokens()
    torch.nn.init.normal_(mixer.project.conv.bias)
    padded = mixer(torch.cat([x, 100 * torch.ones(2, 5, 8, dtype=F64)], 1), torch.arange(14)[None].expand(2, -1) < 9)
    torch.testing.assert_close(padded[:, :9], mixer(x))


def test_wrong_options_are_refused_by_name() -> None:
    with pytest.raises(FrankensteinError, match=r"gated_deltanet_attn.expand_v=1.5 gives 4.5 value channels for 3 key"):
        layer(expand_v=1.5)
    with pytest.raises(FrankensteinError, match=r"gated_deltanet_attn.separate_directions needs model.causal: false"):
        layer(causal=True, separate_directions=True)
