"""Fused GPU kernels of others in place of our own forms of the same operators.

Recurrences: the Triton kernels of https://github.com/fla-org/flash-linear-attention, where the package `fla-core` is
installed (`pip install "frankenstein[gpu]"`), for half precision only: they multiply in bfloat16 or TF32, which float32
tensors, held to 1e-5, must not meet. Their tuning by measured time may pick another kernel in another run, so that
equal bytes are promised without them only.
Patterns: torch's FlexAttention, https://arxiv.org/abs/2412.05496, compiled by Triton, which comes with torch for GPUs;
whole blocks of pairs that a pattern does not keep are never computed.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Kernel = Callable[..., tuple[Tensor, Tensor | None]]
Pattern = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key -> whether the pair is kept

WIDEST_KEY = 256  # channels of a key that the recurrent kernels take
LEAST_LOG_DECAY = -30.0  # exp of it is 0 beside 1 in half precision; longer sums of it would cost the kernels digits
BLOCK = 128  # queries and keys of a block of FlexAttention


def recurrent_kernel(name: str, q: Tensor, v: Tensor) -> Kernel | None:
    """The operator `name` of fla.ops, if it stands for ours on these tensors; None on CPUs and in full precision.

    It takes q, k, v, then the gates, and scale, initial_state and output_final_state, as ours do, and returns the
    output in the dtype of `v` and the final state in that of the state given or in float32.
    """
    if not q.is_cuda or q.shape[-1] > WIDEST_KEY or (half := half_precision(q)) is None or find_spec("fla") is None:
        return None
    operator = _operator(name)

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, initial_state: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        state = None if initial_state is None else initial_state.float()
        with torch.autocast("cuda", enabled=False):
            inputs = [x.to(half) for x in (q, k, v)]
            o, final = operator(*inputs, *gates, initial_state=state, **options)
        return o.to(v.dtype), final

    return kernel


def log_decay(g: Tensor) -> Tensor:
    """`g` as the kernels take it: float32, no lower than what half precision tells from 0."""
    return g.float().clamp(min=LEAST_LOG_DECAY)


def in_both_directions(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: tuple[Tensor, ...] = (),
    *,
    reverse: tuple[Tensor, ...] | None = None,
    scale: float,
    **options: Any,
) -> Tensor:
    """f(x) + flip(f(flip x)) - scale (q . k) v of linear attention, both directions as one batch.

    `reverse` are keys and gates of the direction from right to left, in the order of the tokens; None means the same.
    """
    other = (k, *gates) if reverse is None else reverse
    pairs = zip((q, k, v, *gates), (q, other[0], v, *other[1:]), strict=True)
    o, _ = kernel(*(torch.cat([x, y.flip(1)]) for x, y in pairs), scale=scale, **options)
    forward, backward = o.chunk(2)
    return forward + backward.flip(1) - (scale * (q * k).sum(-1, keepdim=True) * v).to(o.dtype)


def flex(q: Tensor, *block_sizes: int) -> bool:
    """Whether FlexAttention takes blocks of so many tokens, for queries like these."""
    fitting = all(BLOCK % size == 0 or size % BLOCK == 0 for size in block_sizes)
    return q.is_cuda and fitting and q.dtype != torch.float64 and find_spec("triton") is not None


def block_mask(
    table: Tensor,
    length: int,
    *,
    block_sizes: tuple[int, int] = (BLOCK, BLOCK),
    pattern: Pattern | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
) -> BlockMask:
    """The pairs of kept blocks that `pattern` keeps, for `block_attention`; see `flex`.

    Args:
        table: (B or 1, H or 1, query blocks, key blocks) bool, True for the blocks that hold a kept pair.
        length: T.
        block_sizes: tokens of a block of queries and of one of keys; divisors or multiples of `BLOCK`.
        pattern: the kept pairs inside of the blocks; None keeps all.
        lengths: (B,), tokens of each row; None means that all are real.
        causal: only keys up to the query.
    """
    size_q, size_k = block_sizes
    finer = None if block_sizes == (BLOCK, BLOCK) else table.contiguous()
    by_row, by_head = table.shape[0] > 1, table.shape[1] > 1

    def kept(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        pairs = j <= i if causal else j >= 0
        if lengths is not None:
            pairs = pairs & (j < lengths[b])
        if finer is not None:
            pairs = pairs & finer[b if by_row else 0, h if by_head else 0, i // size_q, j // size_k]
        return pairs if pattern is None else pairs & pattern(b, h, i, j)

    table = _resized(_resized(table, size_q, 2), size_k, 3)
    order = table.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    counts = table.sum(-1, dtype=torch.int32)
    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=BLOCK, mask_mod=kept, seq_lengths=(length, length))


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention over the pairs of a `block_mask`.

    Args:
        q, k: (B, T, H, K).
        v: (B, T, H, V).
        mask: (B, T) bool, True for real tokens, which come first; padded queries get 0.
        scale: of the dot products; None means K**-0.5.
    Returns:  (B, T, H, V); 0 for queries without any key.
    """
    return _flex(q, k, v, mask, block_mask=blocks, scale=scale)


def _resized(table: Tensor, size: int, dim: int) -> Tensor:
    """Blocks of `size` tokens along a dimension as blocks of `BLOCK`, kept where a part is kept."""
    if size >= BLOCK:
        return table.repeat_interleave(size // BLOCK, dim)
    count = BLOCK // size
    padding = (0, 0) * (table.dim() - 1 - dim) + (0, -table.shape[dim] % count)
    return F.pad(table, padding).unflatten(dim, (-1, count)).any(dim + 1)


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    e: Tensor | None,
    *,
    mask: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention under a decay of the logits: c_i - c_j for j <= i, e_j - e_i for j > i.

    Args:
        c, e: (B, T, H), sums of log decays; e None sees j <= i only.
        window: one way, the keys i - window + 1 .. i only; None means all.
        The others as in `block_attention`.
    Returns:  (B, T, H, V).
    """
    # One tensor for the query and one for the key: of each, FlexAttention sums the gradient over one index only.
    past, past_key = (c.float().transpose(1, 2).contiguous() for _ in range(2))
    future, future_key = (past, past) if e is None else (e.float().transpose(1, 2).contiguous() for _ in range(2))
    lengths = torch.full((len(q),), q.shape[1], device=q.device) if mask is None else mask.sum(1)

    def decay(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = past[b, h, i] - past_key[b, h, j]
        if e is None:
            seen = j <= i if window is None else (j <= i) & (i - j < window)
        else:
            own, seen = torch.where(j <= i, own, future_key[b, h, j] - future[b, h, i]), j < lengths[b]
        return torch.where(seen, score + own, -float("inf"))

    return _flex(q, k, v, mask, score_mod=decay, scale=scale)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    kind = half_precision(q) or torch.promote_types(q.dtype, v.dtype)
    queries, keys, values = (x.to(kind).transpose(1, 2) for x in (q, k, v))
    with torch.autocast("cuda", enabled=False):
        o = _compiled_flex()(queries, keys, values, **options)
    o = o.transpose(1, 2).to(v.dtype)
    return o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    # Every pattern and every number type is a version of its own; beyond the limit, torch would compute all pairs.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention)


def half_precision(x: Tensor) -> torch.dtype | None:
    """The half precision that x has, or gets under autocast; None for full precision."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return x.dtype
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") and x.dtype == torch.float32 else None


@cache
def _operator(name: str) -> Kernel:
    return getattr(import_module("fla.ops"), name)
