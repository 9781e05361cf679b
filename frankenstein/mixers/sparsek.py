"""SparseK attention: Lou et al. 2024, "Sparser is Faster and Less is More", https://arxiv.org/abs/2406.16747.

    p = SparseK(u, k) = clip(u - tau, 0, 1),    S = the k best of u
    o_i = sum_(j in S) softmax_(j in S)(scale q_i . k_j) p_j v_j

A scoring network gives every key-value pair a score u_j = w . x_j; the k best are attended, and their soft selection p
multiplies the values: it is what gives the scorer a gradient. An encoder selects once a row, so that p and S are those
of the row's real tokens; a causal query selects among the tokens up to itself. With a sliding window, a query also sees
the tokens around it, whole, in the same softmax, and the selection serves those outside.
Shapes: q (B, T, H, K); k (B, T, G, K); v (B, T, G, V); u (B, T, G); query head h reads group h // (H / G).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, repeat_heads
from frankenstein.mixers.sparsek_projection import prefix_thresholds, sparsek
from frankenstein.options import option

__all__ = ["SparseKAttention", "sparsek", "sparsek_attention", "sparsek_dense"]

QUERIES = 128  # that a causal model computes at once


@dataclass(frozen=True)
class Selection:
    """How many pairs a query attends: min(top_k, ceil(density n)) of n, and those of its window.

    A window of w is |i - j| <= w / 2 both ways and i - w < j <= i for causal queries; 0 is none.
    """

    top_k: int = 128
    density: float = 0.5
    window_size: int = 0

    def count(self, tokens: Tensor) -> Tensor:
        """k for every number of tokens, float64."""
        return (self.density * tokens.double() - 1e-9).ceil().clamp(max=self.top_k)

    def in_window(self, distance: Tensor, causal: bool) -> Tensor:
        """Where i - j lies in the window."""
        if causal:
            return (distance >= 0) & (distance < self.window_size)
        return (distance.abs() <= self.window_size // 2) & (self.window_size > 0)


def sparsek_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    *,
    selection: Selection,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The equation above over all pairs, one projection per query. Arguments as `sparsek_attention`."""
    length, heads = q.shape[1:3]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    steps = torch.arange(length, device=q.device)
    distance = steps[:, None] - steps
    real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
    near = selection.in_window(distance, causal) & real[:, None, None, :]
    far = (distance >= max(selection.window_size, 0)) if causal else torch.ones_like(distance, dtype=torch.bool)
    candidates = (far & real[:, None, None, :]).expand(-1, u.shape[2], -1, -1)
    counts = selection.count(candidates.sum(-1))
    z = u.transpose(1, 2)[:, :, None, :].masked_fill(~candidates, -math.inf)
    rank = z.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    chosen = candidates & (rank < counts[..., None])
    gates = torch.where(near, 1.0, sparsek(z, counts) * chosen)
    groups = heads // u.shape[2]
    allowed, gates = ((x.repeat_interleave(groups, 1)) for x in (near | chosen, gates))
    logits = torch.einsum("bihk,bjhk->bhij", q, repeat_heads(k, heads)) * scale
    weights = logits.masked_fill(~allowed, -math.inf).softmax(-1) * gates
    o = torch.einsum("bhij,bjhv->bihv", weights, repeat_heads(v, heads))
    return o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)


def sparsek_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    *,
    selection: Selection,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention over the selected pairs only: linear in T for a fixed selection.

    Source: Lou et al. 2024, https://arxiv.org/abs/2406.16747. Keys are selected hard, values are multiplied by p.
    `causal` also spends O(T^2 / 128) operations on scalars, see `prefix_thresholds`.
    Args:
        q: (B, T, H, K).
        k: (B, T, G, K).
        v: (B, T, G, V).
        u: (B, T, G), scores of the pairs.
        selection: how many pairs are attended.
        mask: (B, T) bool, True for real tokens, which come first; padded rows come out as 0.
        causal: queries see only tokens up to themselves.
        scale: of the dot products; None means K**-0.5.
    Returns:  (B, T, H, V).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if causal:
        o = _causal(q, k, v, u, selection, scale)
    elif selection.window_size:
        o = _windowed(q, k, v, u, selection, mask, scale)
    else:
        o = _whole_row(q, k, v, u, selection, mask, scale)
    return o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)


def _whole_row(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, selection: Selection, mask: Tensor | None, scale: float
) -> Tensor:
    """One set of pairs for all queries of a row."""
    index, p, kept = _select(u, selection, mask)
    keys, values = _take(k, index), _take(v, index)
    values = values * p[..., None].to(values.dtype)
    groups = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (keys, values))
    allowed = None if mask is None else kept[:, :, None, :]
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, allowed, scale=scale).transpose(1, 2)


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, u: Tensor, selection: Selection, mask: Tensor | None, scale: float
) -> Tensor:
    """The row's set where it lies outside a query's window, and the window: chunks of queries, each with its band."""
    batch, length, heads = q.shape[:3]
    half, groups = selection.window_size // 2, k.shape[2]
    size = min(max(half, 64), length)
    chunks = -(-length // size)
    chosen, p, kept = _select(u, selection, mask)
    rows = torch.arange(chunks * size, device=q.device).view(chunks, size)
    band = rows[:, :1] + torch.arange(-half, size + half, device=q.device)
    real = ((band >= 0) & (band < length)).expand(batch, -1, -1)
    band = band.clamp(0, length - 1)
    if mask is not None:
        real = real & mask[:, band]
    near = selection.in_window(rows[:, :, None] - band[:, None, :], causal=False) & real[:, :, None, :]
    far = ~selection.in_window(rows[:, :, None] - chosen[:, :, None, None, :], causal=False)
    far = (far & kept[:, :, None, None, :]).transpose(1, 2)
    allowed = torch.cat([far, near[:, :, None].expand(-1, -1, groups, -1, -1)], -1)  # (B, chunks, G, size, m)
    index = torch.cat(
        [chosen[:, :, None].expand(-1, -1, chunks, -1), band.expand(batch, groups, -1, -1)], -1
    )  # (B, G, chunks, m)
    keys, values = _take(k, index), _take(v, index)
    gates = F.pad(p, (0, band.shape[1]), value=1.0)[:, :, None, :, None]
    values = values * gates.to(values.dtype)
    queries = F.pad(q, (0, 0, 0, 0, 0, chunks * size - length)).view(batch * chunks, size, heads, -1).transpose(1, 2)
    repeats = heads // groups
    keys, values, allowed = (
        (x.repeat_interleave(repeats, 2) if repeats > 1 else x).flatten(0, 1)
        for x in (keys.transpose(1, 2), values.transpose(1, 2), allowed)
    )
    o = F.scaled_dot_product_attention(queries, keys, values, allowed, scale=scale)
    return o.transpose(1, 2).reshape(batch, chunks * size, heads, -1)[:, :length]


def _select(u: Tensor, selection: Selection, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Places (B, G, m) of the best pairs of every row, their p, and which of them the row keeps: (B, 1, m)."""
    z = u.transpose(1, 2)
    if mask is None:
        counts = selection.count(torch.full((u.shape[0], 1), u.shape[1], device=u.device))
    else:
        z, counts = z.masked_fill(~mask[:, None, :], -math.inf), selection.count(mask.sum(1, keepdim=True))
    size = int(counts.max())
    index = z.detach().topk(size, -1).indices
    kept = torch.arange(size, device=u.device) < counts[..., None]
    return index, sparsek(z, counts).gather(-1, index), kept


def _take(x: Tensor, index: Tensor) -> Tensor:
    """(B, T, G, K) at places (B, G, ...): (B, G, ..., K)."""
    batch, length, groups = x.shape[:3]
    ones = (1,) * (index.dim() - 2)
    rows = torch.arange(batch, device=x.device).view(batch, 1, *ones) * length + index
    flat = rows * groups + torch.arange(groups, device=x.device).view(1, groups, *ones)
    return x.reshape(batch * length * groups, -1).index_select(0, flat.flatten()).view(*index.shape, -1)


def _causal(q: Tensor, k: Tensor, v: Tensor, u: Tensor, selection: Selection, scale: float) -> Tensor:
    """Chunks of queries: the best pairs before the chunk, and the tokens from there on, each query with its own set."""
    batch, length = q.shape[:2]
    groups, size = k.shape[2], min(QUERIES, length)
    scores = u.transpose(1, 2)
    steps = torch.arange(length, device=u.device)
    counts = selection.count(steps + 1)
    tau = prefix_thresholds(scores.flatten(0, 1), counts).unflatten(0, (batch, groups))
    index, real = _candidates(scores.detach(), selection, counts, size)
    keys, values, gates = (_take(x, index).unbind(2) for x in (k, v, u[..., None]))
    outputs = []
    for chunk, a in enumerate(range(0, length, size)):
        rows = steps[a : a + size]
        last = rows - selection.window_size  # of the prefix that the query selects from
        place = index[:, :, chunk, None, :]
        near = selection.in_window(rows[:, None] - place, causal=True)
        far = place <= last[:, None]
        # Candidates come best first, so that their rank among those that a query may take is a running count.
        limit = counts[last.clamp(min=0)][:, None]
        allowed = (near | (far & ((far & real[chunk]).cumsum(-1) <= limit))) & real[chunk]
        p = (gates[chunk].mT - tau[:, :, last.clamp(min=0), None]).clamp(0, 1)
        p = p.masked_fill(near, 1.0)[:, :, None]
        query = (q[:, a : a + size] * scale).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # (B, G, R, C, K)
        logits = (query.flatten(2, 3) @ keys[chunk].mT).unflatten(2, query.shape[2:4])
        weights = logits.masked_fill(~allowed[:, :, None], -math.inf).softmax(-1) * p
        o = (weights.flatten(2, 3).to(values[chunk].dtype) @ values[chunk]).unflatten(2, query.shape[2:4])
        outputs.append(o.permute(0, 3, 1, 2, 4).flatten(2, 3))
    return torch.cat(outputs, 1)


def _candidates(scores: Tensor, selection: Selection, counts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Places (B, G, chunks, m), best first, that the queries of each chunk may need, and (chunks, m): which exist.

    A token before the chunk's shared prefix ends that is not among its best is in no query's set.
    """
    batch, groups, length = scores.shape
    found = []
    for a in range(0, length, size):
        b, prefix = min(a + size, length), max(0, a - selection.window_size)
        own = torch.arange(prefix, b, device=scores.device).expand(batch, groups, -1)
        best = scores[..., :prefix].topk(min(prefix, int(counts[max(b - 1 - selection.window_size, 0)])), -1).indices
        index = torch.cat([best, own], -1)
        order = scores.gather(-1, index).argsort(dim=-1, descending=True, stable=True)
        found.append(index.gather(-1, order))
    longest = max(index.shape[-1] for index in found)
    real = torch.stack([torch.arange(longest, device=scores.device) < index.shape[-1] for index in found])
    return torch.stack([F.pad(index, (0, longest - index.shape[-1])) for index in found], 2), real


@MIXERS.register("sparsek_attn")
class SparseKAttention(Mixer):
    """Multi-head attention over the pairs that a scoring network selects, one score per token and key-value head.

    Source: Lou et al. 2024, https://arxiv.org/abs/2406.16747. They fix k for long rows; here k is at most a
    share of the row's tokens, so that short rows are sparse and train the scorer too.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of `sparsek_attn`."""

        top_k: int = option(128, "Most tokens that are selected.", minimum=1)
        density: float = option(
            0.5,
            "Largest share of the tokens that is selected, rounded up; 1 selects all of a row up to top_k, "
            "and such rows give the scorer no gradient.",
            exclusiveMinimum=0.0,
            maximum=1.0,
        )
        window_size: int = option(
            0, "Tokens around a query that it sees beside the selection, in all; 0 is none.", minimum=0
        )
        position_slope: float = option(
            0.0, "Added to the score per position, for causal models: later tokens are preferred.", minimum=0.0
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        if options.position_slope and not context.causal:
            raise FrankensteinError(
                f"model.mixers.sparsek_attn.position_slope={options.position_slope} needs model.causal: true; "
                "both directions allow 0 only"
            )
        self.causal, self.slope = context.causal, options.position_slope
        self.selection = Selection(options.top_k, options.density, options.window_size)
        self.project = HeadProjections(context, context.num_heads, 3, context.num_kv_heads)
        self.out = nn.Linear(context.hidden_size, context.hidden_size, bias=False)
        # A parameter and not a layer: the scorer stays in full precision when linear layers turn ternary.
        groups = context.num_heads if context.num_kv_heads is None else context.num_kv_heads
        self.score_weight = nn.Parameter(torch.empty(groups, context.hidden_size).normal_(std=0.02))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v = self.project(x)
        with torch.autocast(x.device.type, enabled=False):
            u = F.linear(x.to(self.score_weight.dtype), self.score_weight)
            if self.slope:
                u = u + self.slope * torch.arange(x.shape[1], device=x.device, dtype=u.dtype)[:, None]
        o = sparsek_attention(q, k, v, u, selection=self.selection, mask=mask, causal=self.causal)
        return self.out(o.flatten(2))
