"""Longformer: Beltagy et al. 2020, https://arxiv.org/abs/2004.05150.

    o_i = sum_(j in A_i) softmax_j(scale q_i . k_j) v_j        A_i = { j : |i - j| <= w / 2  or  j global }
    o_i = sum_j softmax_j(scale q'_i . k'_j) v'_j              i global, with projections of its own

w is the whole span of the window. One way, also j <= i. The cost is O(T (w + global tokens)).
Shapes: q, k (B, T, H, K); v (B, T, H, V).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, repeat_heads
from frankenstein.mixers.block_sparse import Piece, Tokens, additive, band, masked_softmax, merged_attention
from frankenstein.mixers.gpu_kernels import BLOCK, block_attention, block_mask, flex
from frankenstein.options import option

QueriesKeysValues = tuple[Tensor, Tensor, Tensor]


def longformer_mask(T: int, *, window_size: int, global_tokens: Sequence[int]) -> Tensor:
    """The window, and the rows and columns of the global tokens.

    Args:
        T: tokens.
        window_size: w, the whole span: |i - j| <= w // 2.
        global_tokens: their positions, in any order; may be empty.
    Returns:  (T, T) bool, True where query i sees key j.
    """
    j = torch.arange(T)
    kept = (j[:, None] - j).abs() <= window_size // 2
    chosen = torch.as_tensor(global_tokens, dtype=torch.int64)
    if ((chosen < 0) | (chosen >= T)).any():
        raise FrankensteinError(f"global_tokens={list(global_tokens)}; expected positions 0 .. {T - 1}")
    kept[chosen] = True
    kept[:, chosen] = True
    return kept


def longformer_dense(  # noqa: PLR0913  as the fast form
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    num_global: int,
    of_global: QueriesKeysValues | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The equations, from all T x T logits. Arguments as `longformer_attention`."""
    length = q.shape[1]
    kept = longformer_mask(length, window_size=window_size, global_tokens=range(min(num_global, length))).to(q.device)
    kept = kept.tril() if causal else kept
    if mask is not None:
        kept = kept & mask[:, None, None, :] & mask[:, None, :, None]
    o = masked_softmax(q, k, v, kept, scale=scale)
    if of_global is None:
        return o
    queries, keys, values = of_global
    kept = kept[..., :num_global, : keys.shape[1]]
    return torch.cat([masked_softmax(queries, keys, values, kept, scale=scale), o[:, num_global:]], 1)


def longformer_attention(  # noqa: PLR0913  the pattern has two numbers and projections of its own
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    num_global: int,
    of_global: QueriesKeysValues | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over the window and the first tokens, which see and are seen by all.

    Source: Beltagy et al. 2020, section 3, https://arxiv.org/abs/2004.05150, without dilation. As in their code, other
    queries reach the global tokens through the ordinary k and v.
    Args:
        window_size: w, the whole span: |i - j| <= w // 2.
        num_global: global tokens, the first ones of every row.
        of_global: for the global tokens: their queries (B, num_global, H, K), and the keys and values of all tokens (if
            causal, the first num_global will do); None takes them from q, k, v.
        mask: (B, T) bool, True for real tokens, which come first; padded queries get 0.
        causal: only j <= i.
        scale: of the dot products; None means K**-0.5.
    Returns:  (B, T, H, V).
    """
    length, first = q.shape[1], min(num_global, q.shape[1])
    queries, keys, values = (q[:, :first], k, v) if of_global is None else of_global
    parts = []
    if first:
        pieces = [_global_rows(q, first, mask, causal)]
        parts.append(merged_attention(queries, keys, values, pieces, scale=scale))
    if first < length and flex(q):
        settings = (length, window_size // 2, first, causal, q.device)
        blocks = _band_blocks(*settings) if mask is None else _band_of(mask.sum(1), *settings)
        parts.append(block_attention(q, k, v, blocks, mask=mask, scale=scale)[:, first:])
    elif first < length:
        pieces = band(q, length, window_size // 2, first=first, mask=mask, causal=causal)
        parts.append(merged_attention(q[:, first:], k, v, pieces, scale=scale))
    o = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)


@lru_cache(maxsize=64)
def _band_blocks(length: int, reach: int, first: int, causal: bool, device: torch.device) -> BlockMask:
    """The window and the columns of the global tokens, for rows without padding: found once."""
    return _band_of(None, length, reach, first, causal, device)


def _band_of(
    lengths: Tensor | None, length: int, reach: int, first: int, causal: bool, device: torch.device
) -> BlockMask:
    def pattern(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((i - j).abs() <= reach) | (j < first)

    block = torch.arange(-(-length // BLOCK), device=device)
    apart = (block[:, None] - block).abs() * BLOCK - (BLOCK - 1)  # the least distance of their tokens
    table = (apart <= reach) | (block * BLOCK < first)
    table = table.tril() if causal else table
    return block_mask(table[None, None], length, pattern=pattern, lengths=lengths, causal=causal)


def _global_rows(q: Tensor, first: int, mask: Tensor | None, causal: bool) -> Piece:
    """The first queries with all keys; one way, with each other up to the query."""
    if causal:
        past = torch.ones(1, 1, first, first, dtype=torch.bool, device=q.device).tril()
        return Piece(Tokens(0, first), Tokens(0, first), additive(past, q))
    bias = None if mask is None else additive(mask[:, None, None], q)
    return Piece(Tokens(0, first), Tokens(0, q.shape[1]), bias)


@MIXERS.register("longformer_attn")
class LongformerAttention(Mixer):
    """Multi-head attention with a sliding window and global first tokens, whose own attention has its own projections.

    Source: Beltagy et al. 2020, section 3.1, https://arxiv.org/abs/2004.05150; the global projections start as copies
    of the others, as in https://github.com/allenai/longformer. Their window is 512 in rows of 4096.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of `longformer_attn`."""

        window_size: int = option(
            256, "w, the whole span of the window in tokens: w // 2 on either side of the query.", minimum=2
        )
        num_global: int = option(
            1, "Global tokens, the first ones of every row ([CLS]); they see and are seen by all.", minimum=0
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        width, self.num_heads = context.hidden_size, context.num_heads
        self.causal, self.rotary = context.causal, context.rotary
        self.window_size, self.num_global = options.window_size, options.num_global
        self.project = HeadProjections(context, context.num_heads, 3, context.num_kv_heads)
        self.out = nn.Linear(width, width, bias=False)
        if self.num_global:
            key_values = self.project.linear.out_features - width
            self.query_global = nn.Linear(width, width, bias=False)
            self.key_value_global = nn.Linear(width, key_values, bias=False)
            self.initialize()

    def initialize(self) -> None:
        """The global projections start as copies of the ordinary ones."""
        if self.num_global:
            queries = self.query_global.out_features
            with torch.no_grad():
                self.query_global.weight.copy_(self.project.linear.weight[:queries])
                self.key_value_global.weight.copy_(self.project.linear.weight[queries:])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v = self.project(x)
        k, v = repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
        o = longformer_attention(
            q,
            k,
            v,
            window_size=self.window_size,
            num_global=self.num_global,
            of_global=self._project_global(x) if self.num_global else None,
            mask=mask,
            causal=self.causal,
        )
        return self.out(o.flatten(2))

    def _project_global(self, x: Tensor) -> QueriesKeysValues:
        """Queries of the global tokens, keys and values of the tokens that they see."""
        first = x[:, : self.num_global]
        width = x.shape[-1] // self.num_heads
        q = self.query_global(first).unflatten(-1, (-1, width))
        k, v = self.key_value_global(first if self.causal else x).unflatten(-1, (-1, width)).chunk(2, 2)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        return q, repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
