"""The masks of bigbird_mask.safetensors: `blocks` is where d out_i / d x_j of BigBirdBlockSparseAttention is not 0,
with its random blocks `rand_blocks` (huggingface/transformers 5.23.0, training mode, no dropout); `tokens` was made
with deepspeedai/DeepSpeed@edaa722 BigBirdSparsityConfig, blocks of one token, window 7, 2 global, no random tokens.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MixerContext
from frankenstein.mixers.bigbird import (
    BigBirdAttention,
    bigbird_attention,
    bigbird_dense,
    bigbird_mask,
    random_blocks,
)
from frankenstein.mixers.block_sparse import masked_softmax
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.model.positions import Rotary

F64 = torch.float64
PUBLISHED = load_file(Path(__file__).parent / "bigbird_mask.safetensors")


def random_qkv(length: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(3, length, 2, 4, generator=g, dtype=F64, requires_grad=True) for _ in range(3)]


def layer_of(
    causal: bool = False, layer_index: int = 0, kv_heads: int | None = None, **options: int
) -> BigBirdAttention:
    torch.manual_seed(0)
    context = MixerContext(8, 2, 2, 0.0, causal, 16, layer_index, Rotary(), kv_heads)
    options = {"block_size": 4, "num_random": 1} | options
    return BigBirdAttention(context, BigBirdAttention.Options(**options)).double()


def test_masks_equal_published_code() -> None:
    assert torch.equal(bigbird_mask(48, block_size=4, rand_blocks=PUBLISHED["rand_blocks"]), PUBLISHED["blocks"])
    assert torch.equal(bigbird_mask(64, window_size=7, num_global=2), PUBLISHED["tokens"])


def test_random_keys_are_distinct_new_and_repeatable() -> None:
    plain = bigbird_mask(40, window_size=5, num_global=2)
    masks = [
        bigbird_mask(40, window_size=5, num_global=2, num_random=3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert ((masks[0] & ~plain).sum(1)[2:] == 3).all() and torch.equal(masks[0][:2], plain[:2])
    assert (masks[0] | ~plain).all()
    assert bigbird_mask(6, window_size=3, num_global=1, num_random=9).all()


def test_a_mask_wants_one_of_its_two_forms() -> None:
    with pytest.raises(FrankensteinError, match="block_size and rand_blocks come together"):
        bigbird_mask(8, block_size=4)
    with pytest.raises(FrankensteinError, match="give window_size and num_global, or block_size and rand_blocks"):
        bigbird_mask(8, window_size=3)


def test_random_blocks_of_another_length_are_refused() -> None:
    q, k, v = random_qkv(48)
    drawn = random_blocks(2, 11, 1)
    for refused in (
        lambda: bigbird_mask(48, block_size=4, rand_blocks=drawn),
        lambda: bigbird_attention(q, k, v, drawn, block_size=4),
    ):
        with pytest.raises(FrankensteinError, match=r"shape \(2, 9, 1\); expected 10 query blocks for 12 blocks"):
            refused()


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_random_blocks_are_distinct_and_not_seen_anyway(causal: bool) -> None:
    drawn = random_blocks(3, 20, 4, seed=(5, 1), causal=causal)
    assert drawn.shape == (3, 19 if causal else 18, 4)
    for head in range(3):
        for row, chosen in enumerate(drawn[head].tolist()):
            block, last = row + 1, 20 if causal else 19
            seen = {0, block - 1, block, block + 1, last}
            free = set(range(block if causal else 20)) - seen
            assert len(set(chosen) & free) == min(4, len(free))
            assert set(chosen) <= free | {block}
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn, random_blocks(3, 20, 4, seed=(5, 1), causal=causal))
    assert not torch.equal(drawn, random_blocks(3, 20, 4, seed=(5, 2), causal=causal))


def test_one_way_a_longer_row_keeps_its_random_blocks() -> None:
    short, long = (random_blocks(2, blocks, 3, causal=True) for blocks in (9, 30))
    assert torch.equal(long[:, :8], short)


@pytest.mark.parametrize("num_random", [0, 1, 3])
def test_few_blocks_are_all_seen_or_drawn(num_random: int) -> None:
    blocks = 4 + num_random
    drawn = random_blocks(2, blocks, num_random)
    assert bigbird_mask(2 * blocks, block_size=2, rand_blocks=drawn).all()
    if num_random:
        drawn = random_blocks(2, blocks + 2, num_random)
        assert not bigbird_mask(2 * blocks + 4, block_size=2, rand_blocks=drawn).all()


@pytest.mark.parametrize("lengths", [None, (60, 60, 60), (60, 33, 1), (41, 60, 17)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
@pytest.mark.parametrize(("length", "block_size", "num_random"), [(60, 4, 2), (60, 7, 1), (60, 1, 3), (60, 64, 1)])
@pytest.mark.parametrize("full_blocks", [0, 8])
def test_pieces_equal_the_masked_softmax_with_gradients(
    length: int, block_size: int, num_random: int, causal: bool, lengths: tuple[int, ...] | None, full_blocks: int
) -> None:
    mask = None if lengths is None else torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    drawn = random_blocks(2, -(-length // block_size), num_random, causal=causal)
    settings = {"block_size": block_size, "full_blocks": full_blocks, "mask": mask, "causal": causal, "scale": 0.7}
    results = []
    for function in (bigbird_attention, bigbird_dense):
        inputs = random_qkv(length)
        o = function(*inputs, drawn, **settings)
        results.append((o, *torch.autograd.grad(o.sin().sum(), inputs)))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_published_random_blocks_give_the_published_mask() -> None:
    q, k, v = random_qkv(48)
    o = bigbird_attention(q, k, v, PUBLISHED["rand_blocks"], block_size=4)
    torch.testing.assert_close(o, masked_softmax(q, k, v, PUBLISHED["blocks"]))


def test_repeated_random_blocks_count_once() -> None:
    q, k, v = random_qkv(48)
    drawn = torch.randint(0, 12, (2, 10, 5), generator=torch.Generator().manual_seed(0))
    mask = bigbird_mask(48, block_size=4, rand_blocks=drawn)
    o = bigbird_attention(q, k, v, drawn, block_size=4)
    torch.testing.assert_close(o, masked_softmax(q, k, v, mask))


def test_one_big_block_is_softmax_attention() -> None:
    q, k, v = random_qkv(21)
    for causal in (False, True):
        drawn = random_blocks(2, 1, 2, causal=causal)
        o = bigbird_attention(q, k, v, drawn, block_size=21, causal=causal)
        torch.testing.assert_close(o, softmax_attention(q, k, v, causal=causal))


@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_a_row_in_a_padded_batch_equals_the_row_alone(causal: bool) -> None:
    layer, lengths = layer_of(causal), [90, 61, 30, 25, 5, 1]
    x = torch.randn(6, 90, 8, dtype=F64)
    mask = torch.arange(90)[None] < torch.tensor(lengths)[:, None]
    together = layer(x, mask)
    longer = torch.cat([x, torch.full((6, 50, 8), 7.0, dtype=F64)], 1)
    torch.testing.assert_close(
        layer(longer, torch.nn.functional.pad(mask, (0, 50)))[mask.nonzero(as_tuple=True)], together[mask]
    )
    for row, length in enumerate(lengths):
        torch.testing.assert_close(together[row : row + 1, :length], layer(x[row : row + 1, :length]))


def test_padding_gets_no_gradient() -> None:
    layer = layer_of()
    x = torch.randn(2, 90, 8, dtype=F64, requires_grad=True)
    mask = torch.arange(90)[None] < torch.tensor([[90], [50]])
    layer(x, mask)[mask].sin().sum().backward()
    assert x.grad[1, 50:].abs().max() == 0 and x.grad[1, :50].abs().min() > 0


def test_one_way_a_row_may_grow() -> None:
    layer = layer_of(causal=True)
    x = torch.randn(1, 90, 8, dtype=F64)
    whole = layer(x)
    for length in (1, 4, 13, 37, 89):
        torch.testing.assert_close(layer(x[:, :length]), whole[:, :length])


@pytest.mark.parametrize("kv_heads", [None, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["both_ways", "causal"])
def test_the_layer_follows_the_pattern(causal: bool, kv_heads: int | None) -> None:
    layer, rotary, groups = layer_of(causal, 3, kv_heads, num_random=2, seed=9), Rotary(), kv_heads or 2
    x = torch.randn(1, 50, 8, dtype=F64)
    q, k, v = layer.project.linear(x).unflatten(-1, (-1, 4)).split((2, groups, groups), 2)
    q, k = rotary(q), rotary(k)
    drawn = random_blocks(2, 13, 2, seed=(9, 3), causal=causal)
    o = torch.zeros(1, 50, 2, 4, dtype=F64)
    for i in range(50):
        block = i // 4
        for h in range(2):
            if causal:
                blocks = {0, block - 1, block, *(drawn[h, block - 1].tolist() if block else [])}
            elif block in (0, 12):
                blocks = set(range(13))
            else:
                blocks = {0, block - 1, block, block + 1, 12, *drawn[h, block - 1].tolist()}
            seen = [j for j in range(50) if j // 4 in blocks and (j <= i or not causal)]
            g = h if groups == 2 else 0
            o[0, i, h] = torch.softmax(k[0, seen, g] @ q[0, i, h] / 2, 0) @ v[0, seen, g]
    torch.testing.assert_close(layer(x), layer.out(o.flatten(2)))


def test_short_rows_are_attended_in_full() -> None:
    layer = layer_of()
    x = torch.randn(1, 28, 8, dtype=F64)  # 7 blocks = 5 + 2 r
    o = softmax_attention(*layer.project(x))
    torch.testing.assert_close(layer(x), layer.out(o.flatten(2)))


def test_random_blocks_are_drawn_once_and_differ_between_layers_and_seeds() -> None:
    x = torch.randn(1, 90, 8, dtype=F64)
    first, again = layer_of(), layer_of()
    assert torch.equal(first(x), first(x)) and torch.equal(first(x), again(x))
    torch.manual_seed(77)
    assert torch.equal(first.train()(x), again.eval()(x))
    for other in (layer_of(layer_index=1), layer_of(seed=1)):
        other.load_state_dict(first.state_dict())
        assert not torch.equal(other(x), first(x))


def test_autocast_stays_close() -> None:
    layer, x = layer_of().float(), torch.randn(2, 90, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    torch.testing.assert_close(low.float(), layer(x), rtol=0.05, atol=0.02)
