"""BigBird: Zaheer et al. 2020, https://arxiv.org/abs/2007.14062.

    o_i = sum_(j in A_i) softmax_j(scale q_i . k_j) v_j

Tokens stand in blocks of C. Query block b sees the blocks b - 1, b, b + 1, the first, the last, and r random ones,
drawn once for every head; the first and the last block see all. One way, block b sees the first block, b - 1, r random
earlier ones, and itself up to the query: no block knows whether it is the last. The cost is O(T C (5 + r)).
Shapes: q, k (B, T, H, K); v (B, T, H, V); random blocks (H, blocks - 2, r), or (H, blocks - 1, r) one way.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, at_once, repeat_heads
from frankenstein.mixers.block_sparse import Piece, Rows, Segments, Tokens, additive, masked_softmax, merged_attention
from frankenstein.mixers.gpu_kernels import block_attention, block_mask, flex
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.options import option

# Key and value elements that are gathered at once, per tensor: a few MB stay in cache.
GATHERED = 2**20


def bigbird_mask(
    T: int,
    *,
    window_size: int | None = None,
    num_global: int | None = None,
    num_random: int = 0,
    generator: torch.Generator | None = None,
    block_size: int | None = None,
    rand_blocks: Tensor | None = None,
) -> Tensor:
    """The kept pairs, in tokens (window_size, num_global, num_random) or in blocks (block_size, rand_blocks).

    Args:
        T: tokens.
        window_size: whole span of the window, |i - j| <= window_size // 2.
        num_global: first tokens, which see and are seen by all.
        num_random: distinct keys that every other query sees besides, drawn with `generator`; all where fewer are left.
        generator: of torch; None means the global one.
        block_size: C.
        rand_blocks: (H, blocks - 2, r) int64, key blocks of the query blocks 1 .. blocks - 2.
    Returns:  (T, T) bool in tokens, (H, T, T) in blocks; True where query i sees key j.
    """
    if (block_size is None) != (rand_blocks is None):
        raise FrankensteinError("bigbird_mask: block_size and rand_blocks come together")
    if block_size is not None and rand_blocks is not None:
        _check_drawn(rand_blocks, T, block_size, False)
        return _block_mask(T, block_size, rand_blocks)
    if window_size is None or num_global is None:
        raise FrankensteinError("bigbird_mask: give window_size and num_global, or block_size and rand_blocks")
    j = torch.arange(T)
    kept = (j[:, None] - j).abs() <= window_size // 2
    kept[:num_global] = True
    kept[:, :num_global] = True
    if num_random:
        drawn = torch.rand(T, T, generator=generator).masked_fill(kept, -1.0)
        best = drawn[num_global:].topk(min(num_random, T), 1)
        kept[num_global:] |= torch.zeros_like(kept[num_global:]).scatter(1, best.indices, best.values >= 0)
    return kept


def _check_drawn(rand_blocks: Tensor, length: int, block_size: int, causal: bool) -> None:
    blocks = -(-length // block_size)
    expected = max(blocks - (1 if causal else 2), 0)
    if rand_blocks.shape[-2] != expected:
        raise FrankensteinError(
            f"rand_blocks has shape {tuple(rand_blocks.shape)}; expected {expected} query blocks for {blocks} blocks"
        )


def _block_mask(length: int, block_size: int, rand_blocks: Tensor, *, causal: bool = False) -> Tensor:
    """(H, T, T): the block form of `bigbird_mask`, or the one-way pattern."""
    blocks = -(-length // block_size)
    j = torch.arange(blocks)
    kept = ((j[:, None] - j).abs() <= 1).repeat(len(rand_blocks), 1, 1)
    kept[:, 1 : blocks if causal else -1].scatter_(2, rand_blocks, True)
    kept[..., 0] = True
    if not causal:
        kept[..., -1] = True
        kept[:, [0, -1]] = True
    tokens = kept.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)[:, :length, :length]
    return tokens.tril() if causal else tokens


def random_blocks(
    num_heads: int, num_blocks: int, num_random: int, *, seed: tuple[int, ...] = (0,), causal: bool = False
) -> Tensor:
    """Random key blocks of every query block, outside of the blocks it sees anyway; the same for the same arguments.

    Where fewer than r blocks are left, all of them are taken, and the rest of the places repeat the query block itself.
    One way, the blocks of a query block do not depend on `num_blocks`.
    Args:
        num_heads: H.
        num_blocks: blocks of the row.
        num_random: r.
        seed: of the draw.
    Returns:  (H, num_blocks - 2, r) int64, or (H, num_blocks - 1, r) with `causal`, for query block 1 and on.
    """
    rng = np.random.Generator(np.random.PCG64(seed if causal else (*seed, num_blocks)))
    chosen = np.empty((num_heads, max(num_blocks - (1 if causal else 2), 0), num_random), dtype=np.int64)
    for row in range(chosen.shape[1]):
        block = row + 1
        order = rng.random((num_heads, block if causal else num_blocks)).argsort(1)
        free = (order != 0) & (np.abs(order - block) > 1) & (order != num_blocks - 1)
        # The free blocks first, in the order drawn.
        order = np.take_along_axis(np.where(free, order, block), np.argsort(~free, axis=1, kind="stable"), 1)
        chosen[:, row] = block
        chosen[:, row, : order.shape[1]] = order[:, :num_random]
    return torch.from_numpy(chosen)


def bigbird_dense(  # noqa: PLR0913  as the fast form
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rand_blocks: Tensor,
    *,
    block_size: int,
    full_blocks: int = 0,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The equation, row by row from all logits. Arguments as `bigbird_attention`."""
    rows = []
    for row, length in enumerate(_lengths(q, mask)):
        blocks = -(-length // block_size)
        drawn = rand_blocks if rand_blocks.dim() == 3 else rand_blocks[row]
        drawn = drawn[:, : max(blocks - (1 if causal else 2), 0)].clamp(max=blocks - 1)  # the last one is seen anyway
        kept = _block_mask(length, block_size, drawn, causal=causal).to(q.device)
        if not causal and blocks <= full_blocks:
            kept = torch.ones_like(kept)
        queries, keys, values = (x[row : row + 1, :length] for x in (q, k, v))
        alone = masked_softmax(queries, keys, values, kept, scale=scale)
        rows.append(F.pad(alone, (0, 0, 0, 0, 0, q.shape[1] - length)))
    o = torch.cat(rows)
    return o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)


def bigbird_attention(  # noqa: PLR0913  the pattern has three numbers of its own
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rand_blocks: Tensor,
    *,
    block_size: int,
    full_blocks: int = 0,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over the kept blocks only.

    Source: Zaheer et al. 2020, section 2 and appendix D, https://arxiv.org/abs/2007.14062; their code is
    https://github.com/google-research/bigbird. They count the padding into the row; here the last block is the one with
    the row's last real token, so that padding changes nothing. They have no one-way form; ours is above.
    Args:
        rand_blocks: (H, n - 2, r) int64 for all rows, or (B, H, n - 2, r) for each, n = ceil(T / C); n - 1 if causal. A
            row of fewer blocks reads the first of them, and leaves out blocks that it does not have.
        block_size: C.
        full_blocks: rows of at most so many blocks are attended in full, unless causal.
        mask: (B, T) bool, True for real tokens, which come first; padded queries get 0.
        scale: of the dot products; None means K**-0.5.
    Returns:  (B, T, H, V).
    """
    batch, length, heads, _ = q.shape
    _check_drawn(rand_blocks, length, block_size, causal)
    if flex(q, block_size):
        table = _block_table(q, rand_blocks, block_size, full_blocks, mask, causal)
        real = None if mask is None else mask.sum(1)
        blocks = block_mask(table, length, block_sizes=(block_size, block_size), lengths=real, causal=causal)
        return block_attention(q, k, v, blocks, mask=mask, scale=scale)
    short, lengths = -length % block_size, _lengths(q, mask)
    # Heads become rows, since each has its own blocks: (B H, T, 1, K).
    q, k, v = (F.pad(x.transpose(1, 2), (0, 0, 0, short)).flatten(0, 1)[:, :, None].contiguous() for x in (q, k, v))
    drawn = rand_blocks.to(q.device).expand(batch, heads, -1, -1)
    if causal:
        pieces = _past_pieces(q, drawn, lengths, block_size)
    else:
        pieces = _row_pieces(heads, lengths, block_size, full_blocks)
        pieces += _middle_pieces(q, drawn, lengths, block_size, full_blocks)
    o = merged_attention(q, k, v, pieces, scale=scale)
    o = o.view(batch, heads, length + short, -1)[:, :, :length].transpose(1, 2)
    return o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)


def _block_table(
    q: Tensor, drawn: Tensor, block_size: int, full_blocks: int, mask: Tensor | None, causal: bool
) -> Tensor:
    """(B, H, n, n) bool: the kept pairs of blocks."""
    drawn = drawn.to(q.device).expand(q.shape[0], q.shape[2], -1, -1)
    block = torch.arange(-(-q.shape[1] // block_size), device=q.device)
    kept = ((block[:, None] - block).abs() <= 1).repeat(*drawn.shape[:2], 1, 1)
    kept[:, :, 1 : len(block) if causal else -1].scatter_(3, drawn, True)
    kept[..., 0] = True
    if causal:
        return kept.tril()
    lengths = torch.tensor(_lengths(q, mask), device=q.device)[:, None, None, None]
    last = (lengths - 1) // block_size
    ends = (block == 0) | (block == last)
    return kept | ends | ends.mT | (last < full_blocks)


def _lengths(q: Tensor, mask: Tensor | None) -> list[int]:
    """Real tokens of every row; an empty row counts as one token, whose output is dropped."""
    return [q.shape[1]] * q.shape[0] if mask is None else mask.sum(1).clamp(min=1).tolist()


@dataclass(frozen=True)
class _BlockQueries(Rows):
    """The tokens of the blocks start .. stop-1, each block by itself: (B H, C, stop - start, K)."""

    start: int
    stop: int
    size: int

    def read(self, x: Tensor) -> Tensor:
        return x[:, self.start * self.size : self.stop * self.size, 0].unflatten(1, (-1, self.size)).transpose(1, 2)


@dataclass(frozen=True)
class _ChosenBlocks(Rows):
    """S blocks for each of n query blocks: (B H, S C, n, K). `blocks` (B H, n, S) counts the blocks of all rows."""

    blocks: Tensor
    size: int

    def read(self, x: Tensor) -> Tensor:
        chosen = self._table(x).index_select(0, self.blocks.flatten())
        return chosen.view(*self.blocks.shape[:2], -1, x.shape[-1]).transpose(1, 2)

    def add_(self, x: Tensor, update: Tensor) -> None:
        table = self._table(x)
        table.index_add_(0, self.blocks.flatten(), update.transpose(1, 2).reshape(-1, table.shape[1]).to(x.dtype))

    def _table(self, x: Tensor) -> Tensor:
        return x.view(-1, self.size * x.shape[-1])


def _row_pieces(heads: int, lengths: list[int], block_size: int, full_blocks: int) -> list[Piece]:
    """The queries that see their whole row: those of the first and of the last block, or all of a short row."""
    if len(set(lengths)) == 1:
        rows: list[tuple[tuple[int, int | None], int]] = [((0, None), lengths[0])]
    else:
        rows = [((row * heads, (row + 1) * heads), length) for row, length in enumerate(lengths)]
    pieces = []
    for places, length in rows:
        every = Tokens(0, length, places)
        full = length <= full_blocks * block_size
        pieces.append(Piece(Tokens(0, length if full else min(block_size, length), places), every))
        if length > block_size and not full:
            pieces.append(Piece(Tokens((length - 1) // block_size * block_size, length, places), every))
    return pieces


def _middle_pieces(q: Tensor, drawn: Tensor, lengths: list[int], block_size: int, full_blocks: int) -> list[Piece]:
    """The queries between the first and the last block of their row; drawn (B, H, n, r)."""
    last = (torch.tensor(lengths, device=q.device)[:, None, None, None] - 1) // block_size
    block = torch.arange(1, drawn.shape[2] + 1, device=q.device)[:, None]
    window = (block + torch.tensor([-1, 0, 1], device=q.device)).expand(*drawn.shape[:3], 3)
    between = torch.cat([window, drawn], -1)
    counts = (between > 0) & (between < last)
    counts[..., 3:] &= ((drawn - block).abs() > 1) & _first_of_its_kind(drawn)
    chosen = torch.cat(
        [torch.zeros_like(last).expand_as(window[..., :1]), last.expand_as(window[..., :1]), between], -1
    )
    counts = F.pad(counts, (2, 0), value=True) & (block < last) & (last >= full_blocks)
    return _chosen_pieces(q, chosen, counts, lengths, block_size)


def _past_pieces(q: Tensor, drawn: Tensor, lengths: list[int], block_size: int) -> list[Piece]:
    """One way: every block with itself up to the query and with the earlier blocks it sees; drawn (B, H, n, r)."""
    block = torch.arange(1, drawn.shape[2] + 1, device=q.device)[:, None]
    before = (block - 1).expand(*drawn.shape[:3], 1)
    counts = (drawn > 0) & (drawn < block - 1) & _first_of_its_kind(drawn)
    chosen = torch.cat([torch.zeros_like(before), before, drawn], -1)
    counts = torch.cat([torch.ones_like(before, dtype=torch.bool), before > 0, counts], -1)
    past = torch.ones(1, 1, block_size, block_size, dtype=torch.bool, device=q.device).tril()
    own = Segments(block_size, block_size)
    return [Piece(own, own, additive(past, q)), *_chosen_pieces(q, chosen, counts, lengths, block_size)]


def _first_of_its_kind(drawn: Tensor) -> Tensor:
    """(..., r) bool: False where an earlier place of the last dimension holds the same block."""
    return ~(drawn[..., :, None] == drawn[..., None, :]).tril(-1).any(-1)


def _chosen_pieces(q: Tensor, chosen: Tensor, counts: Tensor, lengths: list[int], block_size: int) -> list[Piece]:
    """Query blocks from 1 on with their chosen (B, H, n, S) key blocks, where `counts`, a few query blocks at once."""
    inside = chosen[..., None] * block_size + torch.arange(block_size, device=q.device)
    real = inside < torch.tensor(lengths, device=q.device)[:, None, None, None, None]
    allowed = (real & counts[..., None]).flatten(3).flatten(0, 1)
    blocks = q.shape[1] // block_size
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None] * blocks
    chosen = chosen.flatten(0, 1).clamp(0, blocks - 1) + rows
    group = max(1, at_once(q, GATHERED) // (q.shape[0] * allowed.shape[-1] * q.shape[-1]))
    pieces = []
    for start in range(0, chosen.shape[1], group):
        stop = min(start + group, chosen.shape[1])
        some = allowed[:, start:stop, None]
        if some.any():
            keys = _ChosenBlocks(chosen[:, start:stop], block_size)
            pieces.append(Piece(_BlockQueries(start + 1, stop + 1, block_size), keys, additive(some, q)))
    return pieces


@MIXERS.register("bigbird_attn")
class BigBirdAttention(Mixer):
    """Multi-head attention with window, global and random blocks.

    Source: Zaheer et al. 2020, https://arxiv.org/abs/2007.14062; the defaults are theirs. The random blocks depend on
    the seed, the layer, the head and the number of blocks of the row alone: they are no parameters, and never redrawn.
    A row of at most 5 + 2 r blocks is attended in full, as in the port to
    https://github.com/huggingface/transformers; one way every row follows the pattern, so that it can grow.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of `bigbird_attn`."""

        block_size: int = option(
            64, "C, tokens of a block; the window is the query's block and both beside it.", minimum=1
        )
        num_random: int = option(3, "r, random key blocks of every query block and head.", minimum=0)
        seed: int = option(0, "Seed of the random blocks.", minimum=0)

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        self.causal, self.num_heads = context.causal, context.num_heads
        self.block_size, self.num_random = options.block_size, options.num_random
        self.seed = (options.seed, context.layer_index)
        self.drawn: dict[int, Tensor] = {}
        self.project = HeadProjections(context, context.num_heads, 3, context.num_kv_heads)
        self.out = nn.Linear(context.hidden_size, context.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v = self.project(x)
        k, v = repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
        blocks = -(-x.shape[1] // self.block_size)
        full = self.num_random + 3 if self.causal else 2 * self.num_random + 5
        if blocks <= full:  # one way, so few blocks are all seen or drawn
            o = softmax_attention(q, k, v, key_padding_mask=mask, causal=self.causal)
        else:
            drawn = self._draw(blocks) if mask is None or self.causal else self._draw_rows(blocks, mask)
            o = bigbird_attention(
                q, k, v, drawn, block_size=self.block_size, full_blocks=full, mask=mask, causal=self.causal
            )
        return self.out(o.flatten(2))

    def _draw(self, blocks: int) -> Tensor:
        """The random blocks of rows of so many blocks."""
        if blocks not in self.drawn:
            drawn = random_blocks(self.num_heads, blocks, self.num_random, seed=self.seed, causal=self.causal)
            self.drawn[blocks] = drawn
        return self.drawn[blocks]

    def _draw_rows(self, blocks: int, mask: Tensor) -> Tensor:
        """(B, H, blocks - 2, r): the random blocks of every row, by its own number of blocks."""
        rows = [self._draw(-(-length // self.block_size)) for length in mask.sum(1).tolist()]
        return torch.stack([F.pad(drawn, (0, 0, 0, blocks - 2 - drawn.shape[1])) for drawn in rows])
