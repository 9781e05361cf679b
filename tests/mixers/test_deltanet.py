import pytest
import torch
import torch.nn.functional as F

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.deltanet import DeltaNet

F64 = torch.float64


def layer(*, causal: bool = False, **options: object) -> DeltaNet:
    torch.manual_seed(0)
    mixer = DeltaNet(MixerContext(8, 2, 2, 0.0, causal, 16, 0, None), DeltaNet.Options(**options)).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return mixer


def tokens() -> torch.Tensor:
    return torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(1), dtype=F64)


def convolved(mixer: DeltaNet, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """The projection and the short convolution, a sum at a time: (7, channels)."""
    z, weight = mixer.project.linear(x)[0], mixer.project.conv.weight
    first = -(weight.shape[1] // 2) if not causal else 1 - weight.shape[1]
    y = torch.zeros_like(z)
    for t in range(7):
        for j in range(weight.shape[1]):
            if 0 <= t + first + j < 7:
                y[t] += weight[:, j] * z[t + first + j]
    return y


def one_way(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """S <- S (I - beta k k^T) + beta v k^T with S (V, K), the authors' letters; one head, (T, ...)."""
    state = torch.zeros(v.shape[1], k.shape[1], dtype=F64)
    outputs = []
    for t in range(len(q)):
        state = state @ (torch.eye(k.shape[1], dtype=F64) - beta[t] * torch.outer(k[t], k[t]))
        state = state + beta[t] * torch.outer(v[t], k[t])
        outputs.append(state @ q[t] / k.shape[1] ** 0.5)
    return torch.stack(outputs)


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_the_layer_follows_the_authors_equation(causal: bool) -> None:
    mixer, x = layer(causal=causal), tokens()
    q, k, v = F.silu(convolved(mixer, x, causal)).view(7, 3, 2, 4).unbind(1)
    q, k = q / (q.norm(dim=-1, keepdim=True) ** 2 + 1e-6).sqrt(), k / (k.norm(dim=-1, keepdim=True) ** 2 + 1e-6).sqrt()
    beta = (x[0] @ mixer.beta.T).sigmoid()
    heads = []
    for h in range(2):
        parts = [a[:, h] for a in (q, k, v, beta)]
        o = one_way(*parts)
        if not causal:
            alone = torch.cat([one_way(*(a[t : t + 1] for a in parts)) for t in range(7)])
            o = o + one_way(*(a.flip(0) for a in parts)).flip(0) - alone
        heads.append(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight)
    torch.testing.assert_close(mixer(x)[0], mixer.out(torch.cat(heads, -1)))


def test_options_change_what_they_say() -> None:
    x = tokens()
    for name, value in {
        "conv_size": 0,
        "qk_activation": "identity",
        "use_beta": False,
        "use_gate": True,
        "allow_neg_eigval": True,
    }.items():
        mixer = layer(**{name: value})
        assert mixer(x).shape == x.shape
        known = layer()
        known.load_state_dict(mixer.state_dict(), strict=False)
        assert not torch.allclose(mixer(x), known(x)), name
    assert layer(expand_k=0.5, expand_v=2.0).project.linear.weight.shape == (2 * 4 + 16, 8)


def test_the_output_gate_is_a_swish_of_the_input() -> None:
    mixer, x = layer(use_gate=True), tokens()
    plain = layer()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if k != "gate.weight"})
    before = []
    mixer.out.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    plain.out.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0]))
    mixer(x), plain(x)
    torch.testing.assert_close(before[0], before[1] * F.silu(x @ mixer.gate.weight.T))


@pytest.mark.parametrize("activation", ["elu", "relu"])
def test_sum_normalized_queries_and_keys_sum_to_one(activation: str) -> None:
    mixer = layer(qk_norm="sum", qk_activation=activation)
    for part in mixer.project(tokens())[:2]:
        assert part.min() >= 0
        some = part.sum(-1) > 0  # relu can leave nothing
        torch.testing.assert_close(part.sum(-1)[some], torch.ones_like(part.sum(-1)[some]))
    assert all(torch.isfinite(part).all() for part in mixer.project(torch.zeros(1, 7, 8, dtype=F64)))
    assert torch.isfinite(mixer(tokens(), torch.arange(7)[None] < 4)).all()


def test_separate_directions_differ_only_in_the_writing_strength_of_the_reverse_one() -> None:
    x, mixer, shared = tokens(), layer(separate_directions=True), layer()
    with torch.no_grad():
        mixer.beta[2:] = mixer.beta[:2]
    shared.load_state_dict({**mixer.state_dict(), "beta": mixer.beta[:2]})
    torch.testing.assert_close(mixer(x), shared(x))
    with torch.no_grad():
        mixer.beta[2:] += 1
    assert not torch.allclose(mixer(x)[:, 0], shared(x)[:, 0])
    torch.testing.assert_close(mixer.project(x), shared.project(x))


def test_wrong_options_are_refused_by_name() -> None:
    with pytest.raises(FrankensteinError, match=r"deltanet_attn.expand_k=0.3 gives heads of 1.2 channels"):
        layer(expand_k=0.3)
    with pytest.raises(FrankensteinError, match=r"qk_norm='sum' needs qk_activation elu or relu.*found 'silu'"):
        layer(qk_norm="sum")
    with pytest.raises(FrankensteinError, match="separate_directions needs use_beta"):
        layer(use_beta=False, separate_directions=True)
    with pytest.raises(FrankensteinError, match=r"separate_directions needs model.causal: false"):
        layer(causal=True, separate_directions=True)
