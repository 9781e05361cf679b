"""Native sparse attention: Yuan et al. 2025, https://arxiv.org/abs/2502.11089.

    o_t = g_cmp o_cmp + g_slc o_slc + g_swa o_swa            their eq. 5; each o is a softmax attention of q_t over
    cmp  the means of k and v in every block of tokens
    slc  the tokens of the blocks that cmp weighs most, of the first block and of those next to t
    swa  the tokens near t

Shapes: q (B, T, HQ, K); k (B, T, H, K); v (B, T, H, V); gates (B, T, HQ), in (0, 1); query head h reads key head
h // (HQ / H), and the query heads of one key head share the selection.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, at_once, repeat_heads
from frankenstein.mixers.selected_blocks import SelectedBlocks
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.options import option

SCORES = 1 << 22  # block scores that are ranked at once
SHORT, DENSE = 1024, 0.4  # rows in which all pairs with a mask are faster than blocks, if they keep such a share


@dataclass(frozen=True)
class Pattern:
    """The sizes of the three branches, and what a query may see.

    Causal queries see the blocks whose last token is not after them; the others see every block with a real token.
    """

    block_size: int
    block_counts: int
    window_size: int
    causal: bool

    def __post_init__(self) -> None:
        fewest = 3 if self.causal else 4
        if self.block_counts < fewest:
            raise FrankensteinError(
                f"block_counts={self.block_counts}: at least {fewest} blocks are always selected, "
                f"the first, the query's own and its neighbours{'' if self.causal else ' on both sides'}"
            )

    def visible(self, length: int, real: Tensor | None, device: torch.device) -> Tensor | None:
        """Bool that broadcasts to (B, T, blocks): where a query may see a block's means; None for everywhere."""
        if self.causal:
            last = torch.arange(1, -(-length // self.block_size) + 1, device=device) * self.block_size - 1
            return (last <= torch.arange(length, device=device)[:, None])[None]
        return None if real is None else real[:, None, :: self.block_size]  # real tokens come first in every block

    def forced(self, length: int, device: torch.device) -> Tensor:
        """(T, blocks): blocks that a query always selects."""
        steps = torch.arange(length, device=device)[:, None] // self.block_size
        blocks = torch.arange(-(-length // self.block_size), device=device)
        before = steps - blocks
        return (blocks == 0) | ((before <= 1) & (before >= (0 if self.causal else -1)))

    def near(self, distance: Tensor) -> Tensor:
        """Where i - j lies in the window."""
        if self.causal:
            return (distance >= 0) & (distance < self.window_size)
        return distance.abs() <= self.window_size // 2


def nsa_dense(  # noqa: PLR0913  the operator's inputs
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor,
    g_slc: Tensor,
    g_swa: Tensor,
    *,
    pattern: Pattern,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The equation above over all pairs: outputs and selected blocks (B, T, H, blocks) bool. Arguments as `nsa`."""
    (batch, length, heads), groups = q.shape[:3], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    real = torch.ones(batch, length, dtype=torch.bool, device=q.device) if mask is None else mask
    steps = torch.arange(length, device=q.device)
    block = F.one_hot(steps // pattern.block_size).bool() & real[..., None]  # (B, T, blocks)
    visible = pattern.visible(length, None, q.device)
    seen = block.any(1, keepdim=True) & (torch.ones_like(block) if visible is None else visible)
    share = block.to(q.dtype) / block.sum(1, keepdim=True).clamp(min=1)
    k_mean, v_mean = (torch.einsum("btc,bthk->bchk", share, x) for x in (k, v))
    o_cmp, weights = _attention(q, k_mean, v_mean, seen[:, None], scale)
    forced = pattern.forced(length, q.device) & (seen | pattern.causal)
    scores = weights.detach().unflatten(1, (groups, -1)).mean(2).masked_fill(~seen[:, None], -1.0)
    scores = scores.masked_fill(forced[:, None], 2.0)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    selected = (rank < pattern.block_counts) & (scores >= 0)  # (B, H, T, blocks)
    allowed = real[:, None, None, :] & (steps[:, None] >= steps if pattern.causal else True)
    of_blocks = (selected[..., steps // pattern.block_size] & allowed).repeat_interleave(heads // groups, 1)
    o_slc, _ = _attention(q, k, v, of_blocks, scale)
    o_swa, _ = _attention(q, k, v, allowed & pattern.near(steps[:, None] - steps), scale)
    o = g_cmp[..., None] * o_cmp + g_slc[..., None] * o_slc + g_swa[..., None] * o_swa
    return o.masked_fill(~real[:, :, None, None], 0.0), selected.transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention written out, with its weights (B, HQ, T, keys); 0 where a query may see nothing."""
    heads = q.shape[2]
    logits = torch.einsum("bihk,bjhk->bhij", q, repeat_heads(k, heads)) * scale
    weights = logits.masked_fill(~allowed, torch.finfo(q.dtype).min).softmax(-1) * allowed
    return torch.einsum("bhij,bjhv->bihv", weights, repeat_heads(v, heads)), weights


def nsa(  # noqa: PLR0913  the operator contract
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor,
    g_slc: Tensor,
    g_swa: Tensor,
    *,
    block_size: int = 64,
    block_counts: int = 16,
    window_size: int = 512,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal native sparse attention; the cost grows with the pairs that the branches keep.

    Source: Yuan et al. 2025, eq. 5-12, https://arxiv.org/abs/2502.11089, with the choices of flash-linear-attention
    (https://github.com/fla-org/flash-linear-attention): blocks are compressed by their mean, where the paper learns an
    MLP, and compressed and selected blocks have one size without overlap.
    Args:
        q: (B, T, HQ, K).
        k: (B, T, H, K).
        v: (B, T, H, V).
        g_cmp, g_slc, g_swa: (B, T, HQ), gates of the branches, after the sigmoid.
        block_size: tokens of a block.
        block_counts: blocks that a query selects, at least 3.
        window_size: tokens that a query sees in its window, itself included.
        scale: of the dot products; None means K**-0.5.
    Returns:  output (B, T, HQ, V), selected blocks (B, T, H, block_counts) int64 with -1 for none.
    Raises:  FrankensteinError: if block_counts is too small for the blocks that are always selected.
    """
    pattern = Pattern(block_size, block_counts, window_size, causal=True)
    o, index = _attend(q, k, v, (g_cmp, g_slc, g_swa), pattern, None, scale)
    return o, index


def nsa_bidirectional(  # noqa: PLR0913  the operator contract
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_cmp: Tensor,
    g_slc: Tensor,
    g_swa: Tensor,
    *,
    block_size: int = 64,
    block_counts: int = 16,
    window_size: int = 512,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Native sparse attention for an encoder: every block is visible, selection and window reach both ways.

    Source: Yuan et al. 2025, https://arxiv.org/abs/2502.11089, whose model is causal; the blocks after the query are
    treated as those before it.
    Args:
        block_counts: blocks that a query selects, at least 4.
        window_size: a query sees the tokens with |i - j| <= window_size // 2.
        mask: (B, T) bool, True for real tokens, which come first; the others count in no mean and no softmax, and their
            rows come out as 0.
        The others as `nsa`.
    Returns:  output (B, T, HQ, V), selected (B, T, H, blocks) bool.
    Raises:  FrankensteinError: if block_counts is too small for the blocks that are always selected.
    """
    pattern = Pattern(block_size, block_counts, window_size, causal=False)
    o, index = _attend(q, k, v, (g_cmp, g_slc, g_swa), pattern, mask, scale)
    return (o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)), _members(index, pattern, q.shape[1])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, Tensor, Tensor],
    pattern: Pattern,
    real: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The gated sum of the three branches, and the selected blocks (B, T, H, block_counts), -1 for none."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = pattern.visible(q.shape[1], real, q.device)
    key_means, value_means = (_block_means(x, pattern.block_size, real) for x in (k, v))
    index = _select(q.detach(), key_means.detach(), pattern, visible, scale)
    g_cmp, g_slc, g_swa = (gate[..., None].to(q.dtype) for gate in gates)
    o = g_cmp * _compressed(q, key_means, value_means, visible, scale)
    o = o + g_slc * _selected(q, k, v, index, pattern, real, scale)
    return o + g_swa * _window(q, k, v, pattern, real, scale), index


def _block_means(x: Tensor, block_size: int, real: Tensor | None) -> Tensor:
    """(B, blocks, H, K): means over the real tokens of every block; 0 where there is none."""
    length = x.shape[1]
    pad = -length % block_size
    if real is None:
        real = x.new_ones(1, length, dtype=torch.bool)
    else:
        x = x.masked_fill(~real[:, :, None, None], 0.0)
    counts = F.pad(real, (0, pad)).unflatten(1, (-1, block_size)).sum(2).clamp(min=1)
    sums = F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, block_size)).sum(2)
    return sums / counts[..., None, None].to(x.dtype)


def _compressed(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """(B, T, HQ, V): attention over the means; 0 for queries that see no block."""
    heads = q.shape[2]
    keys, values = repeat_heads(keys, heads), repeat_heads(values, heads)
    allowed = None if visible is None else visible[:, None]
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, allowed, scale=scale).transpose(1, 2)


@torch.no_grad()
def _select(q: Tensor, keys: Tensor, pattern: Pattern, visible: Tensor | None, scale: float) -> Tensor:
    """(B, T, H, block_counts): the forced blocks, then those with the highest mean weight in a group's heads."""
    batch, length, heads = q.shape[:3]
    blocks, groups = keys.shape[1:3]
    count = min(pattern.block_counts, blocks)
    forced = pattern.forced(length, q.device)
    keys = keys.permute(0, 2, 3, 1)[:, :, None]  # (B, H, 1, K, blocks)
    found = []
    for rows in torch.arange(length, device=q.device).split(max(1, at_once(q, SCORES) // (batch * heads * blocks))):
        some = slice(int(rows[0]), int(rows[-1]) + 1)
        queries = q[:, some].unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # (B, H, R, L, K)
        logits = (queries * scale) @ keys
        seen = visible if visible is None or visible.shape[1] == 1 else visible[:, some]
        if seen is not None:
            seen = seen[:, None, None]
            logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        scores = logits.softmax(-1).mean(2)  # (B, H, L, blocks)
        always = forced[some]
        if seen is not None:
            scores = scores.masked_fill(~seen[:, 0], -1.0)
            always = always if pattern.causal else always & seen[:, 0]
        best = scores.masked_fill(always, 2.0).topk(count, -1)
        found.append(best.indices.masked_fill(best.values < 0, -1))
    index = torch.cat(found, 2).transpose(1, 2)
    return F.pad(index, (0, pattern.block_counts - count), value=-1)


def _members(index: Tensor, pattern: Pattern, length: int) -> Tensor:
    """Block numbers (B, T, H, S), -1 for none, as (B, T, H, blocks) bool."""
    blocks = -(-length // pattern.block_size)
    member = torch.zeros(*index.shape[:3], blocks + 1, dtype=torch.bool, device=index.device)
    return member.scatter_(-1, index.masked_fill(index < 0, blocks), True)[..., :-1]


def _selected(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, pattern: Pattern, real: Tensor | None, scale: float
) -> Tensor:
    """(B, T, HQ, V): attention over the tokens of the selected blocks."""
    heads, groups, length = q.shape[2], k.shape[2], q.shape[1]
    kept = pattern.block_counts * pattern.block_size
    if kept >= length:  # every block is selected
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
        return softmax_attention(q, k, v, key_padding_mask=real, causal=pattern.causal, scale=scale)
    chosen = _members(index, pattern, length)
    if length <= SHORT and kept >= DENSE * length:
        return _masked(q, k, v, chosen, pattern, real, scale)
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        inputs = (x.to(dtype) for x in (q.unflatten(2, (groups, -1)), k, v))
        o = SelectedBlocks.apply(*inputs, chosen, real, pattern.block_size, pattern.causal, scale)
    return o.flatten(2, 3).to(q.dtype)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, pattern: Pattern, real: Tensor | None, scale: float
) -> Tensor:
    """`_selected` over all pairs, which costs less where a large share of them is kept."""
    length, heads = q.shape[1:3]
    allowed = chosen.repeat_interleave(pattern.block_size, -1)[..., :length]
    if pattern.causal:
        allowed &= torch.ones(length, length, dtype=torch.bool, device=q.device).tril()[:, None]
    if real is not None:
        allowed &= real[:, None, None, :]
    allowed = repeat_heads(allowed, heads).transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (q, repeat_heads(k, heads), repeat_heads(v, heads)))
    return F.scaled_dot_product_attention(q, k, v, allowed, scale=scale).transpose(1, 2)


def _window(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, real: Tensor | None, scale: float) -> Tensor:
    """(B, T, HQ, V): attention over the tokens near the query: chunks of queries, each over its own band of keys."""
    batch, length, heads = q.shape[:3]
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    reach = pattern.window_size - 1 if pattern.causal else pattern.window_size // 2
    if reach >= length - 1:
        return softmax_attention(q, k, v, key_padding_mask=real, causal=pattern.causal, scale=scale)
    size = max(32, -(-reach // 2) if pattern.causal else reach)
    chunks, before = -(-length // size), -(-reach // size)
    after = 0 if pattern.causal else before
    queries = F.pad(q, (0, 0, 0, 0, 0, chunks * size - length)).view(batch * chunks, size, heads, -1)
    keys, values = (_bands(x, size, before, after).flatten(0, 1) for x in (k, v))
    rows = torch.arange(chunks * size, device=q.device).view(chunks, size)
    band = rows[:, :1] + torch.arange(-before * size, (1 + after) * size, device=q.device)  # (chunks, m)
    known = (band >= 0) & (band < length)
    if real is not None:
        known = known & real[:, band.clamp(0, length - 1)]
    allowed = pattern.near(rows[:, :, None] - band[:, None, :]) & known[..., None, :]
    allowed = allowed.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    o = F.scaled_dot_product_attention(queries, keys, values, allowed, scale=scale)
    return o.transpose(1, 2).reshape(batch, chunks * size, heads, -1)[:, :length]


def _bands(x: Tensor, size: int, before: int, after: int) -> Tensor:
    """(B, T, H, K) to (B, chunks, (before + 1 + after) size, H, K): every chunk with its neighbours."""
    chunks = -(-x.shape[1] // size)
    x = F.pad(x, (0, 0, 0, 0, before * size, (chunks + after) * size - x.shape[1])).unflatten(1, (-1, size))
    return torch.cat([x[:, i : i + chunks] for i in range(before + 1 + after)], 2)


@MIXERS.register("nsa_attn")
class NativeSparseAttention(Mixer):
    """Native sparse attention with grouped heads and a sigmoid gate for each branch, token and head.

    Source: Yuan et al. 2025, section 3, https://arxiv.org/abs/2502.11089. The paper's sizes are those of rows of
    thousands of tokens (blocks of 64, 16 of them, window 512); the defaults here suit an encoder's.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of `nsa_attn`."""

        block_size: int = option(16, "Tokens of a block, which is compressed and selected as one.", minimum=1)
        block_counts: int = option(
            8,
            "Blocks that a query selects, the first, its own and its neighbours included: those are 4, 3 if causal.",
            minimum=3,
        )
        window_size: int = option(
            64, "Tokens of the window: as many before a causal query, half on each side of others.", minimum=1
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        self.pattern = Pattern(options.block_size, options.block_counts, options.window_size, context.causal)
        self.project = HeadProjections(context, context.num_heads, 3, context.num_kv_heads)
        self.out = nn.Linear(context.hidden_size, context.hidden_size, bias=False)
        # A parameter and not a layer: the gates stay in full precision when linear layers turn ternary.
        self.gate_weight = nn.Parameter(torch.empty(3 * context.num_heads, context.hidden_size).normal_(std=0.02))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v = self.project(x)
        with torch.autocast(x.device.type, enabled=False):
            gates = F.linear(x.to(self.gate_weight.dtype), self.gate_weight).sigmoid()
        real = None if self.pattern.causal else mask  # padding comes last, so that no real causal token sees it
        g_cmp, g_slc, g_swa = gates.chunk(3, -1)
        o, _ = _attend(q, k, v, (g_cmp, g_slc, g_swa), self.pattern, real, None)
        return self.out(o.flatten(2))
