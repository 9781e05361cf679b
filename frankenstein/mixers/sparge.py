"""SpargeAttn: Zhang et al. 2025, https://arxiv.org/abs/2502.18137, code https://github.com/thu-ml/SpargeAttn.

    stage 1   s(I) = mean over x, y in block I of cos(x, y)                     self-similarity of a block of q or k
              P(I, J) = softmax_J(scale mean(q in I) . mean(k in J)),  -inf for J with s(J) <= simthreshd1
              keep (I, J) for the largest P(I, .) with cumulated P <= cdfthreshd, at least one,
              and for every I or J with s <= simthreshd1
              o_i = softmax attention of i over the tokens of the blocks that its own block keeps
    stage 2   going through the kept J in order, m_I = running row maxima of the logits S(I, J):
              leave J out if max over rows of (rowmax S(I, J) - m_I) log2(e) + pvthreshd <= 0

It needs no training and has no gradient through the selection: train with `standard_attn`, evaluate with this.
Shapes: q, k (B, T, H, K); v (B, T, H, V); I = 1 .. nq blocks of block_q queries, J = 1 .. nk blocks of block_k keys.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, repeat_heads
from frankenstein.mixers.gpu_kernels import block_attention, block_mask, flex
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.options import option

_GATHERED_TOKENS = 4096  # keys gathered at once; their keys and values stay in the cache


def sparge_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """o of the equation above, stage 1, written out. Arguments as `block_sparse_attention`."""
    length = q.shape[1]
    kept = block_map.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :length, :length]
    if causal:
        kept = kept.tril()
    if mask is not None:
        kept = kept & mask[:, None, None, :] & mask[:, None, :, None]
    logits = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~kept, float("-inf")).softmax(-1).nan_to_num()  # a query without any key gets 0
    return torch.einsum("bhij,bjhv->bihv", weights, v)


def sparge_attention(  # noqa: PLR0913  the published interface
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    simthreshd1: float = 0.6,
    cdfthreshd: float | None = None,
    topk: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    smooth_k: bool = False,
    pvthreshd: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention on the pairs of blocks that `sparge_block_map` keeps, computed by `block_sparse_attention`.

    Source: Zhang et al. 2025, algorithm 1, https://arxiv.org/abs/2502.18137, without int8 quantization.
    Returns:  output (B, T, H, V), block map (B, H, nq, nk) bool.
    """
    block_map = sparge_block_map(
        q,
        k,
        block_q=block_q,
        block_k=block_k,
        simthreshd1=simthreshd1,
        cdfthreshd=cdfthreshd,
        topk=topk,
        causal=causal,
        mask=mask,
        smooth_k=smooth_k,
    )
    o = block_sparse_attention(
        q, k, v, block_map, block_q=block_q, block_k=block_k, causal=causal, mask=mask, pvthreshd=pvthreshd
    )
    return o, block_map


@torch.no_grad()
def sparge_block_map(  # noqa: PLR0913  the published interface
    q: Tensor,
    k: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    simthreshd1: float = 0.6,
    cdfthreshd: float | None = None,
    topk: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    smooth_k: bool = False,
) -> Tensor:
    """Stage 1: the pairs of query and key blocks that are computed.

    Source: Zhang et al. 2025, section 3.3, https://arxiv.org/abs/2502.18137, as `get_block_map_meansim` of the authors'
    code has it: the kept probability may fall short of cdfthreshd by one block.
    Args:
        q, k: (B, T, H, K).
        block_q, block_k: tokens in a block; a last block with fewer counts as not self-similar.
        simthreshd1: self-similarity in [-1, 1] that a block must exceed; 1 keeps every pair.
        cdfthreshd: cumulated probability of the kept key blocks; above 1 keeps every pair.
        topk: share of the key blocks that are kept; exactly one of cdfthreshd and topk is given.
        causal: query block I sees the key blocks that start before its end.
        mask: (B, T) bool, True for real tokens, which come first; every row equals the row alone.
        smooth_k: compare and pool the keys minus their mean, which attention does not see.
    Returns:  (B, H, nq, nk) bool; False in rows and columns without any real token.
    """
    _check(block_q, block_k, cdfthreshd, topk)
    length, dtype = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    lengths = _lengths(q, mask)
    allowed = _allowed_blocks(lengths, length, block_q, block_k, causal)
    if length <= block_k:  # the only key block is always kept
        return allowed.repeat(1, q.shape[2], 1, 1)
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.to(dtype), k.to(dtype)
        if smooth_k:
            k = k - _mean_of_real(k, mask)
        queries, similar_q = _pool(q, block_q, simthreshd1, lengths)
        keys, similar_k = _pool(k, block_k, simthreshd1, lengths)
        score = queries @ keys.mT * q.shape[-1] ** -0.5
    score = score.masked_fill(~(similar_k[:, :, None] & allowed), float("-inf")).softmax(-1)
    probability, order = score.sort(dim=-1, descending=True, stable=True)
    if topk is None:  # rows without any candidate are NaN; all their keys are kept below
        count = (probability.cumsum(-1) <= cdfthreshd).sum(-1, keepdim=True)
    else:
        blocks = (lengths + block_k - 1) // block_k
        count = (topk * blocks.double()).long()[:, None, None, None]
    best = torch.arange(order.shape[-1], device=q.device) < count.clamp(min=1)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, best.expand_as(order))
    return (kept | ~similar_k[:, :, None] | ~similar_q[..., None]) & allowed


def block_sparse_attention(  # noqa: PLR0913  the operator and its settings
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    *,
    block_q: int = 128,
    block_k: int = 64,
    causal: bool = False,
    mask: Tensor | None = None,
    pvthreshd: float | None = None,
) -> Tensor:
    """Softmax attention on the kept pairs of blocks only: time and memory grow with their number.

    Query blocks that keep equally many tokens are computed together on the gathered keys, so that nothing is padded.
    Source: Zhang et al. 2025, section 3.4, https://arxiv.org/abs/2502.18137. Stage 2 decides for a whole query block,
    the authors' kernel for each of its warps, and never for the last two key blocks.
    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        block_map: (B, H, nq, nk) bool.
        causal: query i sees the keys j <= i only; a query without any key gets 0.
        mask: (B, T) bool, True for real tokens, which come first; padded rows of the output are 0.
        pvthreshd: > 0, in powers of two; stage 2 leaves out what is this much below the maximum. None turns it off.
    Returns:  (B, T, H, V).
    """
    if pvthreshd is not None and pvthreshd <= 0:
        raise FrankensteinError(f"pvthreshd={pvthreshd}; expected a number above 0, or None for no second stage")
    length = q.shape[1]
    lengths = _lengths(q, mask)
    whole = torch.equal(block_map, _allowed_blocks(lengths, length, block_q, block_k, causal).expand_as(block_map))
    if whole and (pvthreshd is None or not block_map.any()):
        o = softmax_attention(q, k, v, key_padding_mask=mask, causal=causal)
    elif pvthreshd is None and flex(q, block_q, block_k):
        blocks = block_mask(block_map, length, block_sizes=(block_q, block_k), lengths=lengths, causal=causal)
        return block_attention(q, k, v, blocks, mask=mask)
    else:
        o = _block_sparse(q, k, v, block_map, lengths, (block_q, block_k), causal, pvthreshd)
    return o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)


def _block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: Tensor,
    lengths: Tensor,
    blocks: tuple[int, int],
    causal: bool,
    pvthreshd: float | None,
) -> Tensor:
    (batch, length, heads, _), num_q = q.shape, block_map.shape[2]
    block_q, block_k = blocks
    queries = F.pad(q, (0, 0, 0, 0, 0, num_q * block_q - length)).unflatten(1, (num_q, block_q))
    queries = queries.permute(0, 3, 1, 2, 4).flatten(0, 2)  # (B H nq, block_q, K)
    keys, values = k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1])
    counts = _kept_tokens(block_map, lengths, block_k)
    parts = []
    if not causal and pvthreshd is None:
        full = (counts == lengths[:, None, None]) & (counts > 0)
        parts = _whole_rows(queries, k, v, full, lengths)
        counts = counts.masked_fill(full, 0)
    for row, tokens in _equal_groups(block_map.flatten(0, 2), counts.flatten(), block_k):
        example, head = row // (heads * num_q), row // num_q % heads
        index = (((example * length)[:, None] + tokens) * heads + head[:, None]).flatten()
        query = queries.index_select(0, row)
        key, value = (x.index_select(0, index).unflatten(0, tokens.shape) for x in (keys, values))
        place = (row % num_q)[:, None] * block_q + torch.arange(block_q, device=q.device)
        seen = (tokens[:, None] <= place[..., None]) if causal else None
        if pvthreshd is None:
            o = _softmax(query, key, value, seen)
        else:
            real = place < lengths[example, None]
            o = _without_small_blocks(query, key, value, seen, real, block_k, pvthreshd)
        parts.append((row, o))
    o = v.new_zeros(batch * heads * num_q, block_q, v.shape[-1], dtype=parts[0][1].dtype)
    o = o.index_copy(0, torch.cat([row for row, _ in parts]), torch.cat([part for _, part in parts]))
    return o.unflatten(0, (batch, heads, num_q)).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]


def _softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Softmax attention (n, L, V) of queries (n, L, K) and keys (n, M, K); seen (n, L, M)."""
    hidden = None if seen is None else seen[:, None]
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=hidden)[:, 0]


def _kept_tokens(block_map: Tensor, lengths: Tensor, block_k: int) -> Tensor:
    """(B, H, nq): real tokens in the key blocks that each query block keeps."""
    first = torch.arange(block_map.shape[-1], device=block_map.device) * block_k
    return (block_map * (lengths[:, None] - first).clamp(0, block_k)[:, None, None]).sum(-1)


def _whole_rows(queries: Tensor, k: Tensor, v: Tensor, full: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The query blocks (B, H, nq) that keep every key, with their outputs: one head at a time, and nothing gathered."""
    parts = []
    for example, head in full.any(-1).nonzero().tolist():
        row = full[example, head].nonzero()[:, 0] + (example * full.shape[1] + head) * full.shape[2]
        query = queries.index_select(0, row)
        key, value = (x[None, example, : lengths[example], head] for x in (k, v))
        parts.append((row, _softmax(query.flatten(0, 1)[None], key, value)[0].unflatten(0, query.shape[:2])))
    return parts


def _equal_groups(rows: Tensor, counts: Tensor, block_k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Query blocks (n,) of rows (B H nq, nk) that keep equally many tokens, and these tokens (n, kept)."""
    inside = torch.arange(block_k, device=rows.device)
    for count in counts[counts > 0].unique().tolist():
        for row in (counts == count).nonzero()[:, 0].split(max(1, _GATHERED_TOKENS // count)):
            kept = rows[row].nonzero()[:, 1].view(len(row), -1)
            # Only the last block of an example may have fewer tokens, and it comes last: the cut removes its padding.
            yield row, (kept[..., None] * block_k + inside).flatten(1)[:, :count]


def _without_small_blocks(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, real: Tensor, block_k: int, pvthreshd: float
) -> Tensor:
    """Stage 2 for query blocks (n, block_q, K) with their keys (n, kept, K); `real` (n, block_q) tells padding."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    kept = _stage_two(logits.detach(), real, block_k, pvthreshd)
    outputs = []
    for logit, value, keep in zip(logits, v, kept.repeat_interleave(block_k, 1)[:, : k.shape[1]], strict=True):
        if not keep.all():
            place = keep.nonzero()[:, 0]
            logit, value = logit.index_select(1, place), value.index_select(0, place)
        weights = logit.softmax(-1)
        outputs.append((weights if seen is None else weights.nan_to_num()) @ value)
    return torch.stack(outputs)


def _stage_two(logits: Tensor, real: Tensor, block_k: int, pvthreshd: float) -> Tensor:
    """(n, blocks): which of the kept key blocks of logits (n, block_q, kept) reach the running maximum of some row."""
    ragged = -logits.shape[-1] % block_k
    highest = F.pad(logits, (0, ragged), value=float("-inf")).unflatten(-1, (-1, block_k)).amax(-1)
    below = (highest - highest.cummax(-1).values).nan_to_num(nan=float("-inf"))
    below = below.masked_fill(~real[..., None], float("-inf")).amax(1)
    return below * math.log2(math.e) + pvthreshd > 0


def _pool(x: Tensor, size: int, threshold: float, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Means (B, H, n, K) of the blocks of x and whether they are self-similar (B, H, n).

    The mean cosine of all pairs is the squared length of the mean unit vector.
    """
    count = -(-x.shape[1] // size)
    padded = F.pad(x, (0, 0, 0, 0, 0, count * size - x.shape[1])).unflatten(1, (count, size))
    unit = (padded / padded.norm(dim=-1, keepdim=True)).mean(2)
    similarity = unit.square().sum(-1).clamp(max=1)  # without the clamp, rounding lets equal vectors exceed 1
    full = (torch.arange(1, count + 1, device=x.device) * size) <= lengths[:, None]
    return padded.mean(2).transpose(1, 2), (similarity > threshold).transpose(1, 2) & full[:, None]


def _allowed_blocks(lengths: Tensor, length: int, block_q: int, block_k: int, causal: bool) -> Tensor:
    """(B, 1, nq, nk): pairs of blocks that both have real tokens, in the order of time if causal."""
    first_q, first_k = (torch.arange(0, length, size, device=lengths.device) for size in (block_q, block_k))
    allowed = (first_q < lengths[:, None])[:, None, :, None] & (first_k < lengths[:, None])[:, None, None, :]
    return allowed & (first_k < first_q[:, None] + block_q) if causal else allowed


def _lengths(q: Tensor, mask: Tensor | None) -> Tensor:
    """(B,): real tokens in each row."""
    return torch.full((q.shape[0],), q.shape[1], device=q.device) if mask is None else mask.sum(1)


def _mean_of_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 1, H, K): mean of the real tokens."""
    if mask is None:
        return x.mean(1, keepdim=True)
    real = mask[:, :, None, None]
    return x.masked_fill(~real, 0.0).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)


def _check(block_q: int, block_k: int, cdfthreshd: float | None, topk: float | None) -> None:
    if min(block_q, block_k) < 1:
        raise FrankensteinError(f"block_q={block_q}, block_k={block_k}; expected at least 1 token")
    if (cdfthreshd is None) == (topk is None):
        raise FrankensteinError(
            f"sparge_attn: found cdfthreshd={cdfthreshd} and topk={topk}; expected one of them, and null for the other"
        )


@MIXERS.register("sparge_attn")
class SpargeAttention(Mixer):
    """Multi-head softmax attention on selected blocks, for models trained with `standard_attn`; evaluation only.

    Source: Zhang et al. 2025, https://arxiv.org/abs/2502.18137. The defaults are those of the authors' code; stage 2 is
    off, since it is no gain on CPU. With `causal`, which blocks are kept, and nothing else, depends on all tokens of
    the query's own block, and the blocks on the diagonal are kept besides, so that every token sees itself.
    """

    trainable: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Options:
        """Options of `sparge_attn`."""

        block_q: int = option(128, "Tokens in a block of queries.", minimum=1)
        block_k: int = option(64, "Tokens in a block of keys.", minimum=1)
        simthreshd1: float = option(
            0.6, "Mean cosine inside a block above which it may be skipped; 1 skips none.", minimum=-1.0, maximum=1.0
        )
        cdfthreshd: float | None = option(
            0.98, "Predicted attention probability that is computed; above 1 all is; null with topk.", minimum=0.0
        )
        topk: float | None = option(None, "Share of key blocks that is computed; null with cdfthreshd.", minimum=0.0)
        smooth_k: bool = option(True, "Subtract the mean key before blocks are compared and pooled.")
        pvthreshd: float | None = option(
            None, "Powers of two below the maximum at which a block is left out; null never.", exclusiveMinimum=0.0
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        _check(options.block_q, options.block_k, options.cdfthreshd, options.topk)
        self.causal, self.num_heads, self.options = context.causal, context.num_heads, options
        self.project = HeadProjections(context, context.num_heads, 3, context.num_kv_heads)
        self.out = nn.Linear(context.hidden_size, context.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        if self.training:
            raise FrankensteinError(
                "sparge_attn runs in evaluation only: its choice of blocks has no gradient; train with standard_attn, "
                "whose weights it takes"
            )
        q, k, v = self.project(x)
        k, v = repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
        return self.out(self._attend(q, k, v, mask).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        o = self.options
        sizes = {"block_q": o.block_q, "block_k": o.block_k}
        block_map = sparge_block_map(
            q,
            k,
            **sizes,
            simthreshd1=o.simthreshd1,
            cdfthreshd=o.cdfthreshd,
            topk=o.topk,
            causal=self.causal,
            mask=mask,
            smooth_k=o.smooth_k,
        )
        if self.causal:
            first_q, first_k = (torch.arange(0, q.shape[1], size, device=q.device) for size in (o.block_q, o.block_k))
            diagonal = (first_k < first_q[:, None] + o.block_q) & (first_q[:, None] < first_k + o.block_k)
            allowed = _allowed_blocks(_lengths(q, mask), q.shape[1], o.block_q, o.block_k, True)
            block_map = block_map | (diagonal & allowed)
        return block_sparse_attention(q, k, v, block_map, **sizes, causal=self.causal, mask=mask, pvthreshd=o.pvthreshd)
