"""FASA: the gathered form against the masked dense one and published numbers, calibration against sets of indices."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers import fasa as fasa_module
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.contextual_agreement import contextual_agreement, dominant_chunks, largest
from frankenstein.mixers.fasa import FasaAttention, calibrate, fasa, fasa_attention, fasa_dense
from frankenstein.mixers.standard_attn import StandardAttention, softmax_attention
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.positions import Rotary

F64 = torch.float64
DOMINANT = torch.tensor([[1, 3], [0, 2], [3, 2]])


def random_inputs(length: int, batch: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(length)
    shapes = [(batch, length, 3, 8), (batch, length, 3, 8), (batch, length, 3, 5)]
    return [torch.randn(*s, generator=g, dtype=F64, requires_grad=True) for s in shapes]


def right_padding(length: int, *lengths: int) -> torch.Tensor:
    return torch.arange(length)[None] < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize(("prefix", "n_fac", "causal"), [("", 12, False), ("causal_", 5, True)])
def test_values_and_selection_equal_torchs_topk_and_attention(prefix: str, n_fac: int, causal: bool, dtype) -> None:
    """torch 2.13 topk and scaled_dot_product_attention on the scores of the dominant chunks, in float64."""
    case = load_file(Path(__file__).parent / "fasa.safetensors")
    q, k, v = (case[prefix + name].to(dtype) for name in "qkv")
    o, selected = fasa(q, k, v, case[prefix + "dominant"], n_fac=n_fac, causal=causal)
    assert torch.equal(selected, case[prefix + "expected_selected"])
    tolerance = 1e-9 if dtype == F64 else 1e-5
    torch.testing.assert_close(o.double(), case[prefix + "expected_o"], rtol=10 * tolerance, atol=tolerance)
    assert o.dtype == dtype


@pytest.mark.parametrize("rope_pairing", ["interleaved", "half"])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("length", "n_fac"), [(1, 1), (9, 4), (70, 5), (131, 64), (131, 100)])
def test_gathered_equals_dense_with_gradients(
    length: int, n_fac: int, padded: bool, causal: bool, rope_pairing
) -> None:
    mask = right_padding(length, length, max(1, length - 50)) if padded else None
    settings = {"n_fac": n_fac, "causal": causal, "mask": mask, "rope_pairing": rope_pairing, "scale": 0.4}
    results = []
    for function in (fasa_dense, fasa, lambda *x, **s: (fasa_attention(*x, **s), None)):
        inputs = random_inputs(length)
        o, selected = function(*inputs, DOMINANT, **settings)
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
        if function is fasa:
            assert torch.equal(selected, fasa_dense(*inputs, DOMINANT, **settings)[1])
    for plain, with_map, alone in zip(*results, strict=True):
        torch.testing.assert_close(with_map, plain, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(alone, plain, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize("n_fac", [1, 7, 60, 90])
def test_every_query_selects_exactly_its_number_of_visible_tokens(n_fac: int, causal: bool) -> None:
    length, lengths = 80, [80, 33]
    q, k, v = random_inputs(length)
    q.data[:, 5], k.data[:, 10:60] = 0.0, 1.0  # ties everywhere
    mask = right_padding(length, *lengths)
    _, selected = fasa(q, k, v, DOMINANT, n_fac=n_fac, causal=causal, mask=mask)
    for row, real in enumerate(lengths):
        visible = torch.arange(1, real + 1) if causal else torch.full((real,), real)
        assert torch.equal(selected[row, :, :real].sum(-1), visible.clamp(max=n_fac).expand(3, -1))
        assert not selected[row, :, :, real:].any()
        assert not (causal and selected[row].triu(1).any())


@pytest.mark.parametrize("n_fac", [40, 41, 400])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_with_as_many_tokens_as_the_row_it_is_softmax_attention(n_fac: int, causal: bool) -> None:
    q, k, v = random_inputs(40)
    o, selected = fasa(q, k, v, DOMINANT, n_fac=n_fac, causal=causal)
    expected = softmax_attention(q, k, v, causal=causal)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(fasa_attention(q, k, v, DOMINANT, n_fac=n_fac, causal=causal), expected)
    assert torch.equal(selected[0, 0], torch.ones(40, 40).tril().bool() if causal else torch.ones(40, 40).bool())


@pytest.mark.parametrize("rope_pairing", ["interleaved", "half"])
def test_with_all_chunks_dominant_the_best_logits_are_selected(rope_pairing: str) -> None:
    q, k, v = random_inputs(75)
    _, selected = fasa(q, k, v, torch.arange(4).repeat(3, 1), n_fac=6, rope_pairing=rope_pairing)
    best = torch.einsum("bihk,bjhk->bhij", q, k).topk(6).indices
    assert torch.equal(selected, torch.zeros_like(selected).scatter(-1, best, True))


def test_the_selection_looks_at_the_dominant_channels_only() -> None:
    q, k, v = random_inputs(70)
    _, selected = fasa(q, k, v, DOMINANT[:1].expand(3, -1), n_fac=6)
    for pairing, channels in (("interleaved", [2, 3, 6, 7]), ("half", [1, 5, 3, 7])):
        _, selected = fasa(q, k, v, DOMINANT[:1].expand(3, -1), n_fac=6, rope_pairing=pairing)
        best = torch.einsum("bihk,bjhk->bhij", q[..., channels], k[..., channels]).topk(6).indices
        assert torch.equal(selected, torch.zeros_like(selected).scatter(-1, best, True))


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_a_padded_row_equals_the_row_alone_and_padding_gets_no_gradient(causal: bool) -> None:
    lengths = [90, 66, 20, 1]
    q, k, v = random_inputs(90, batch=4)
    mask = right_padding(90, *lengths)
    real = mask[:, :, None, None]
    filled = [x.where(real, torch.full((), 1e3, dtype=F64)) for x in (q, k, v)]
    o = fasa_attention(*filled, DOMINANT, n_fac=20, causal=causal, mask=mask)
    for row, n in enumerate(lengths):
        alone = fasa_attention(*(x[row : row + 1, :n] for x in (q, k, v)), DOMINANT, n_fac=20, causal=causal)
        torch.testing.assert_close(o[row : row + 1, :n], alone)
    assert o.masked_select(~real).abs().max() == 0
    for grad in torch.autograd.grad(o.sin().sum(), (q, k, v)):
        assert grad.masked_select(~real).abs().max() == 0 and torch.isfinite(grad).all()


def test_largest_takes_exactly_the_count_also_among_equals() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [float("-inf")] * 5])
    for count in range(1, 6):
        index = largest(scores, count)
        assert index.shape == (2, count)
        assert all(len(set(row)) == count for row in index.tolist())
        assert torch.equal(scores[0][index[0]].sort().values, scores[0].sort().values[5 - count :])


def agreement_by_sets(q, k, top_k: int, causal: bool, lengths: list[int], rope_pairing: str) -> torch.Tensor:
    """The definition, one query at a time with Python sets; (H, K/2)."""
    heads, width = q.shape[2:]
    found = torch.zeros(heads, width // 2, dtype=torch.int64)
    for b, length in enumerate(lengths):
        for i in range(length):
            seen = i + 1 if causal else length
            if seen <= top_k:
                continue
            for h in range(heads):
                products = q[b, i, h] * k[b, :seen, h]
                of_all = set(products.sum(-1).topk(top_k).indices.tolist())
                for f in range(width // 2):
                    pair = [f, f + width // 2] if rope_pairing == "half" else [2 * f, 2 * f + 1]
                    own = set(products[:, pair].sum(-1).topk(top_k).indices.tolist())
                    found[h, f] += len(of_all & own)
    return found


@pytest.mark.parametrize("rope_pairing", ["interleaved", "half"])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_contextual_agreement_is_the_share_of_common_indices(causal: bool, rope_pairing: str) -> None:
    q, k, _ = (x.detach() for x in random_inputs(29, batch=3))
    lengths = [29, 17, 4]  # the last row is too short to count
    mask = right_padding(29, *lengths)
    settings = {"top_k": 5, "causal": causal, "mask": mask, "rope_pairing": rope_pairing}
    common, count = contextual_agreement(q, k, **settings)
    expected = agreement_by_sets(q, k, 5, causal, lengths, rope_pairing)
    assert count == ((29 - 5) + (17 - 5) if causal else 29 + 17)
    assert torch.equal(common, expected)
    best = expected.sort(dim=-1, descending=True, stable=True).indices[:, :2]
    assert torch.equal(dominant_chunks(q, k, 2, **settings), best)


def test_calibration_finds_the_chunks_that_carry_the_dot_product() -> None:
    q, k, _ = (x.detach() for x in random_inputs(60))
    for head, f in enumerate((2, 0, 3)):
        q[:, :, head, 2 * f : 2 * f + 2] *= 20
    assert dominant_chunks(q, k, 1, top_k=6)[:, 0].tolist() == [2, 0, 3]


def layer_of(*, causal: bool = False, groups: int | None = None, **options) -> FasaAttention:
    torch.manual_seed(0)
    context = MixerContext(32, 4, 2, 0.0, causal, 32, 0, Rotary(), num_kv_heads=groups)
    return FasaAttention(context, FasaAttention.Options(**options)).double().eval()


def encoder_of(*, causal: bool = False, layers: int = 2, **options) -> Encoder:
    torch.manual_seed(0)
    settings = ModelOptions(
        vocab_size=40,
        hidden_size=32,
        num_layers=layers,
        layer_pattern=("fasa_attn",),
        ffn_hidden_size=8,
        causal=causal,
        mixers={"fasa_attn": options},
    )
    encoder = Encoder(settings, max_length=64).eval()
    torch.nn.init.normal_(encoder.embedding.weight)
    return encoder


def batches(length: int = 50) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 40, (2, 3, length), generator=g)
    return [(ids[0], None), (ids[1], right_padding(length, length, length - 20, 3).long())]


def test_the_layer_refuses_to_train_and_to_be_built_without_rotary_positions() -> None:
    with pytest.raises(FrankensteinError, match=r"fasa_attn runs in evaluation only.*train with standard_attn"):
        layer_of().train()(torch.randn(1, 5, 32, dtype=F64))
    with pytest.raises(FrankensteinError, match=r"needs model\.positions: rope"):
        FasaAttention(MixerContext(32, 4, 2, 0.0, False, 32, 0, None), FasaAttention.Options())
    with pytest.raises(FrankensteinError, match=r"model\.positions: none does not work in fasa_attn"):
        Encoder(ModelOptions(hidden_size=32, layer_pattern=("fasa_attn",), positions="none"))


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_the_layer_learns_the_pairing_from_the_rotation(pairing: str) -> None:
    context = MixerContext(32, 4, 2, 0.0, False, 32, 0, Rotary(pairing=pairing))
    assert FasaAttention(context, FasaAttention.Options()).rope_pairing == pairing


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_the_layer_takes_the_weights_of_standard_attention_and_equals_it_on_short_rows(causal: bool, groups) -> None:
    layer = layer_of(n_tip=2, n_fac=43, causal=causal, groups=groups)
    context = MixerContext(32, 4, 2, 0.0, causal, 32, 0, Rotary(), num_kv_heads=groups)
    standard = StandardAttention(context, StandardAttention.Options()).double()
    missing, unexpected = standard.load_state_dict(layer.state_dict(), strict=False)
    assert missing == [] and sorted(unexpected) == ["calibrated", "dominant"]
    x, mask = torch.randn(2, 43, 32, dtype=F64), right_padding(43, 43, 20)
    torch.testing.assert_close(layer(x, mask)[mask], standard(x, mask)[mask])


def test_the_layer_follows_the_equation() -> None:
    layer = layer_of(n_tip=2, n_fac=6)
    layer.dominant.copy_(torch.tensor([[1, 3], [0, 2], [3, 2], [0, 1]]))
    layer.calibrated.fill_(True)
    x = torch.randn(1, 21, 32, dtype=F64)
    q, k, v = layer.project.linear(x)[0].view(21, 3, 4, 8).unbind(1)
    q, k = Rotary()(q[None])[0], Rotary()(k[None])[0]
    o = torch.zeros(21, 4, 8, dtype=F64)
    for head in range(4):
        channels = [c for f in layer.dominant[head].tolist() for c in (2 * f, 2 * f + 1)]
        for i in range(21):
            best = (k[:, head, channels] @ q[i, head, channels]).topk(6).indices
            o[i, head] = (k[best, head] @ q[i, head] / 8**0.5).softmax(0) @ v[best, head]
    torch.testing.assert_close(layer(x)[0], layer.out(o.flatten(1)))


def test_an_uncalibrated_layer_refuses_rows_that_it_would_have_to_select_from() -> None:
    layer, x = layer_of(n_tip=2, n_fac=6), torch.randn(2, 9, 32, dtype=F64)
    with pytest.raises(FrankensteinError, match=r"met 9 tokens, more than n_fac=6.*n_tip=2 of 4.*calibrate"):
        layer(x)
    layer(x[:, :6])
    layer(x, right_padding(9, 6, 2))
    layer_of(n_tip=4, n_fac=6)(x)
    layer_of(n_tip=16, n_fac=6)(x)


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_calibration_sets_the_chunks_of_every_layer_from_all_batches(causal: bool) -> None:
    encoder = encoder_of(n_tip=2, n_fac=8, causal=causal)
    seen: list[list[torch.Tensor]] = [[], []]
    for block, inputs in zip(encoder.blocks, seen, strict=True):
        block.mixer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args))
    calibrate(encoder, batches())
    for block, inputs in zip(encoder.blocks, seen, strict=True):
        layer, sums = block.mixer, []
        for x, mask in inputs:
            q, k, _ = layer.project(x)
            sums.append(contextual_agreement(q, k, top_k=8, causal=causal, mask=mask))
        best = sum(common for common, _ in sums).sort(dim=-1, descending=True, stable=True).indices[:, :2]
        assert torch.equal(layer.dominant, best) and layer.calibrated
    ids, mask = batches()[1]
    assert torch.isfinite(encoder(ids, mask)).all()
    assert not torch.equal(encoder.blocks[0].mixer.dominant, torch.arange(2).repeat(4, 1))


def test_calibration_runs_with_full_attention_and_survives_saving() -> None:
    encoder = encoder_of(n_tip=2, n_fac=8)
    exact = encoder_of(n_tip=2, n_fac=64)
    ids, mask = batches()[1]
    outputs: list[torch.Tensor] = []
    handle = encoder.final_norm.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    calibrate(encoder, [(ids, mask)])
    handle.remove()
    torch.testing.assert_close(outputs[0][mask.bool()], exact(ids, mask)[mask.bool()])
    other = encoder_of(n_tip=2, n_fac=8)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(ids, mask), encoder(ids, mask))
    assert not torch.allclose(encoder(ids, mask), exact(ids, mask))


def test_a_calibration_that_fails_leaves_the_layers_as_they_were() -> None:
    encoder = encoder_of(n_tip=2, n_fac=8)

    def broken():
        yield batches()[0]
        raise RuntimeError("the data ended badly")

    with pytest.raises(RuntimeError, match="ended badly"):
        calibrate(encoder, broken())
    for few in (batches(length=8), []):
        with pytest.raises(FrankensteinError, match="no calibration token sees more than top_k=8 tokens"):
            calibrate(encoder, few)
    assert not any(block.mixer.calibrated for block in encoder.blocks)
    with pytest.raises(FrankensteinError, match="more than n_fac=8"):
        encoder(*batches()[0])
    calibrate(encoder, batches(length=8), top_k=3)
    assert all(block.mixer.calibrated for block in encoder.blocks)


def test_calibration_names_what_is_wrong() -> None:
    with pytest.raises(FrankensteinError, match="no fasa_attn layer"):
        calibrate(torch.nn.Linear(2, 2), [])
    with pytest.raises(FrankensteinError, match="top_k=0"):
        calibrate(encoder_of(), batches(), top_k=0)
    q, k, v = random_inputs(9)
    with pytest.raises(FrankensteinError, match="unknown rope_pairing 'quarter'; known: interleaved, half"):
        fasa(q, k, v, DOMINANT, rope_pairing="quarter")


def test_bfloat16_autocast_works_on_the_sparse_path() -> None:
    encoder = encoder_of(n_tip=4, n_fac=8)
    ids, mask = batches()[1]
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder(ids, mask)
    assert torch.isfinite(low).all()
    full = encoder(ids, mask)
    similarity = torch.nn.functional.cosine_similarity(low.float(), full, -1)[mask.bool()]
    assert similarity.mean() > 0.98


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_gpu_form_selects_the_same_pairs(causal: bool, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, 70, 2, 8, dtype=torch.float64) for _ in range(3))
    dominant = torch.tensor([[0, 2], [3, 1]])
    mask = torch.arange(70) < torch.tensor([[70], [33]]) if padded else None
    options = {"n_fac": 9, "causal": causal, "mask": mask}
    expected = fasa_module.fasa_attention(q, k, v, dominant, **options)
    settings = fasa_module._Settings(9, causal, 8**-0.5, fasa_module._channels(dominant, 8, "interleaved"))
    monkeypatch.setattr(fasa_module, "at_once", lambda *_: 2 * 2 * 70 * 16)  # 16 queries at a time
    torch.testing.assert_close(fasa_module._masked(q, k, v, settings, mask), expected)
