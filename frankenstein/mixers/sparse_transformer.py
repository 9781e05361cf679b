"""Sparse Transformer: Child et al. 2019, https://arxiv.org/abs/1904.10509.

    o_i = sum_(j in A_i) softmax_j(scale q_i . k_j) v_j,    with stride l and c summary columns
    A_i = { j : |i - j| < l  or  (i - j) mod l = 0 }                                            strided
    A_i = { j : floor(i / l) = floor(j / l)  or  j mod l >= l - c }                             fixed

One way, also j <= i. Both factors of the pattern stand in one softmax (their section 4.3, the merged head). With l near
sqrt(T) the cost is O(T sqrt(T)). Shapes: q, k (B, T, H, K); v (B, T, H, V).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, repeat_heads
from frankenstein.mixers.block_sparse import (
    Piece,
    Rows,
    Segments,
    Tokens,
    additive,
    band,
    masked_softmax,
    merged_attention,
)
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.options import option

PATTERNS = ("strided", "fixed")


def sparse_transformer_mask(T: int, *, pattern: str, stride: int, causal: bool, summary_cols: int = 1) -> Tensor:
    """The pairs that the module docstring keeps.

    Args:
        T: tokens.
        pattern: "strided" or "fixed".
        stride: l.
        causal: only j <= i.
        summary_cols: c, of the fixed pattern.
    Returns:  (T, T) bool, True where query i sees key j.
    """
    _check(pattern, stride, summary_cols)
    j = torch.arange(T)
    i = j[:, None]
    if pattern == "strided":
        kept = ((i - j).abs() < stride) | ((i - j) % stride == 0)
    else:
        kept = (i // stride == j // stride) | (j % stride >= stride - summary_cols)
    return kept & (j <= i) if causal else kept


def sparse_transformer_dense(  # noqa: PLR0913  as the fast form
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: str,
    stride: int,
    summary_cols: int = 1,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The equation, from all T x T logits. Arguments as `sparse_transformer_attention`."""
    kept = sparse_transformer_mask(
        q.shape[1], pattern=pattern, stride=stride, causal=causal, summary_cols=summary_cols
    ).to(q.device)
    if mask is not None:
        kept = kept & mask[:, None, None, :] & mask[:, None, :, None]
    return masked_softmax(q, k, v, kept, scale=scale)


def sparse_transformer_attention(  # noqa: PLR0913  the pattern has three numbers of its own
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: str,
    stride: int,
    summary_cols: int = 1,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over the kept pairs only.

    Source: Child et al. 2019, section 4.3, https://arxiv.org/abs/1904.10509. Without `causal` the strided pattern is
    the symmetric one, and the fixed pattern also sees the summary columns of later segments.
    Args:
        mask: (B, T) bool, True for real tokens, which come first; padded queries get 0.
        scale: of the dot products; None means K**-0.5.
        The others as in `sparse_transformer_mask`.
    Returns:  (B, T, H, V).
    """
    _check(pattern, stride, summary_cols)
    length = q.shape[1]
    if length <= stride:  # one segment: every pair is kept
        o = softmax_attention(q, k, v, key_padding_mask=mask, causal=causal, scale=scale)
    else:
        short = -length % stride
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, short)) if short else x.contiguous() for x in (q, k, v))
        real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else F.pad(mask, (0, short))
        real[:, length:] = False
        if pattern == "strided":
            pieces = _columns(q, stride, real, causal)
            pieces += band(q, length, stride - 1, with_self=False, mask=mask, causal=causal)
        else:
            pieces = _segments(q, stride, summary_cols, real, causal)
        o = merged_attention(q, k, v, pieces, scale=scale)[:, :length]
    return o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)


@dataclass(frozen=True)
class _Columns(Rows):
    """Tokens with the same place in their segment, each place by itself: (B, T / stride, stride H, K)."""

    stride: int

    def read(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.stride * x.shape[2], x.shape[3])


@dataclass(frozen=True)
class _SummaryColumns(Rows):
    """The last `count` tokens of every segment, together: (B, T / stride count, H, K)."""

    stride: int
    count: int

    def read(self, x: Tensor) -> Tensor:
        return self._last(x).flatten(1, 2)

    def add_(self, x: Tensor, update: Tensor) -> None:
        self._last(x).add_(update.unflatten(1, (-1, self.count)))

    def _last(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.stride))[:, :, -self.count :]


def _columns(q: Tensor, stride: int, real: Tensor, causal: bool) -> list[Piece]:
    """The pairs with (i - j) mod l = 0, as l dense products of T / l tokens; real (B, T)."""
    rows = _Columns(stride)
    if causal:  # no real query sees padding
        places = q.shape[1] // stride
        allowed = torch.ones(1, 1, places, places, dtype=torch.bool, device=q.device).tril()
    else:
        allowed = real.unflatten(1, (-1, stride)).mT.repeat_interleave(q.shape[2], 1)[:, :, None]
    return [Piece(rows, rows, additive(allowed, q))]


def _segments(q: Tensor, stride: int, summary_cols: int, real: Tensor, causal: bool) -> list[Piece]:
    """The pairs of the fixed pattern: own segment without its summary columns, then all summary columns."""
    length, own = q.shape[1], stride - summary_cols
    every, summaries = Tokens(0, length), _SummaryColumns(stride, summary_cols)
    if causal:
        inside = torch.ones(1, 1, stride, own, dtype=torch.bool, device=q.device).tril()
        steps = torch.arange(length, device=q.device)
        across = (summaries.read(steps[None, :, None, None]).flatten() <= steps[:, None])[None, None]
    else:
        inside = real.reshape(-1, stride)[:, None, None, :own]
        across = summaries.read(real[..., None, None])[:, None, None, :, 0, 0]
    pieces = [Piece(every, summaries, additive(across, q))]
    if own:
        pieces.append(Piece(Segments(stride, stride), Segments(stride, own), additive(inside, q)))
    return pieces


def _check(pattern: str, stride: int, summary_cols: int) -> None:
    if pattern not in PATTERNS:
        raise FrankensteinError(f"unknown sparse pattern {pattern!r}; known: {', '.join(PATTERNS)}")
    if stride < 1:
        raise FrankensteinError(f"stride={stride}; expected at least 1")
    if not 1 <= summary_cols <= stride:
        raise FrankensteinError(f"summary_cols={summary_cols}; expected 1 .. stride={stride}")


@MIXERS.register("sparse_transformer_attn")
class SparseTransformerAttention(Mixer):
    """Multi-head attention with the strided or the fixed pattern, both factors in every head.

    Source: Child et al. 2019, https://arxiv.org/abs/1904.10509. The stride is an option, not the square root of the row
    length, so that padding never moves the pattern; the authors use 128 and, in the fixed pattern, 8 to 32 summaries.
    """

    @dataclass(frozen=True)
    class Options:
        """Options of `sparse_transformer_attn`."""

        pattern: str = option(
            "fixed",
            "Local segments with summary columns (fixed, the authors' choice for text), or a band with every l-th "
            "token (strided, theirs for images).",
            enum=list(PATTERNS),
        )
        stride: int = option(
            128, "l, in tokens: a segment of the fixed pattern, the step of the strided one.", minimum=1
        )
        summary_cols: int = option(
            8, "c, the last tokens of every segment that all queries see (fixed pattern).", minimum=1
        )

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        if options.pattern == "fixed" and options.summary_cols > options.stride:
            raise FrankensteinError(
                f"model.mixers.sparse_transformer_attn.summary_cols={options.summary_cols} is more than "
                f"stride={options.stride}"
            )
        self.causal, self.num_heads = context.causal, context.num_heads
        self.pattern, self.stride = options.pattern, options.stride
        self.summary_cols = min(options.summary_cols, options.stride)
        self.project = HeadProjections(context, context.num_heads, 3, context.num_kv_heads)
        self.out = nn.Linear(context.hidden_size, context.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        q, k, v = self.project(x)
        k, v = repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
        o = sparse_transformer_attention(
            q,
            k,
            v,
            pattern=self.pattern,
            stride=self.stride,
            summary_cols=self.summary_cols,
            mask=mask,
            causal=self.causal,
        )
        return self.out(o.flatten(2))
