"""Contextual agreement of RoPE's frequencies, from FASA: Wang et al. 2026, https://arxiv.org/abs/2602.03152.

    alpha_ij = q_i . k_j = sum_f alpha_ij^(f)         alpha^(f): the two channels that RoPE turns at frequency f
    CA_f     = mean_i |TopK_j(alpha_i.) & TopK_j(alpha_i.^(f))| / K

The two channels of a frequency are a chunk. A head's dominant chunks are those with the highest CA on calibration data:
alone, they point at the tokens that the whole dot product points at. No code is published, and the paper's text leaves
open whether alpha is raw or normalized: raw here.
Shapes: q, k (B, T, H, K), turned by RoPE; K/2 chunks.
"""

import numpy as np
import torch
from torch import Tensor

from frankenstein.errors import FrankensteinError

PAIRINGS = ("interleaved", "half")
_QUERIES = 16  # queries whose scores in all chunks are held at once


def chunk_scores(q: Tensor, k: Tensor, rope_pairing: str = "interleaved") -> Tensor:
    """alpha^(f) of every chunk: q (..., Tq, H, K) and k (..., T, H, K) to (..., H, K/2, Tq, T)."""
    return _pairs(q, rope_pairing) @ _pairs(k, rope_pairing).mT


def contextual_agreement(
    q: Tensor,
    k: Tensor,
    *,
    top_k: int,
    causal: bool = False,
    mask: Tensor | None = None,
    rope_pairing: str = "interleaved",
) -> tuple[Tensor, int]:
    """Common indices |TopK(alpha) & TopK(alpha^(f))| of every chunk, summed over queries, and the number of queries.

    CA is the quotient, divided by K; sums of several batches add up. Queries that see at most top_k keys agree in every
    chunk; they are not counted.
    Source: Wang et al. 2026, https://arxiv.org/abs/2602.03152.
    Args:
        q, k: (B, T, H, K), already turned by position.
        top_k: K, keys that are compared.
        causal: query i sees the keys j <= i only.
        mask: (B, T) bool, True for real tokens, which come first.
        rope_pairing: chunk f is the channels (2f, 2f + 1), "interleaved", or (f, f + K/2), "half".
    Returns:  (H, K/2) int64, number of counted queries.
    """
    common = torch.zeros(q.shape[2], q.shape[-1] // 2, dtype=torch.int64, device=q.device)
    dtype, count = torch.promote_types(q.dtype, torch.float32), 0
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for example, length in enumerate(valid_lengths(q, mask)):
            query, key = (x[example, :length].to(dtype) for x in (q, k))
            for first in range(top_k if causal else 0, length if length > top_k else 0, _QUERIES):
                block = query[first : first + _QUERIES]
                alpha = chunk_scores(block, key, rope_pairing)
                if causal:
                    alpha = alpha.masked_fill(future(first, len(block), length, q.device), float("-inf"))
                of_all = torch.zeros_like(alpha[:, :1], dtype=torch.bool)
                of_all.scatter_(-1, largest(alpha.sum(1, keepdim=True), top_k), True)
                common += of_all.expand_as(alpha).gather(-1, largest(alpha, top_k)).sum((2, 3))
                count += len(block)
    return common, count


def dominant_chunks(
    q: Tensor,
    k: Tensor,
    n_tip: int,
    *,
    top_k: int = 256,
    causal: bool = False,
    mask: Tensor | None = None,
    rope_pairing: str = "interleaved",
) -> Tensor:
    """The n_tip chunks of every head with the highest contextual agreement, best first.

    Source: Wang et al. 2026, https://arxiv.org/abs/2602.03152.
    Args:
        n_tip: in 1 .. K/2.
        The others as `contextual_agreement`.
    Returns:  (H, n_tip) int64.
    Raises:   FrankensteinError: if no query sees more than top_k keys.
    """
    common, count = contextual_agreement(q, k, top_k=top_k, causal=causal, mask=mask, rope_pairing=rope_pairing)
    return best_chunks(common, count, n_tip, top_k)


def best_chunks(common: Tensor, count: int, n_tip: int, top_k: int) -> Tensor:
    """(H, n_tip) int64 from sums (H, K/2) over `count` queries; the lower frequency index wins a tie."""
    if count == 0:
        raise FrankensteinError(
            f"fasa_attn: no calibration token sees more than top_k={top_k} tokens, where all frequencies agree; "
            "expected longer rows or a smaller top_k"
        )
    return common.sort(dim=-1, descending=True, stable=True).indices[:, :n_tip].contiguous()


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices (..., count) of the largest scores (..., T), in any order; exactly `count`, also among equals."""
    if scores.device.type == "cpu":  # numpy selects several times as fast as torch.topk
        start = scores.shape[-1] - count
        index = np.argpartition(scores.detach().numpy(), start, axis=-1)[..., start:]
        return torch.from_numpy(np.ascontiguousarray(index))
    return scores.topk(count, dim=-1, sorted=False).indices


def future(first: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys): which keys come after the queries first, first + 1, .."""
    return torch.arange(keys, device=device) > torch.arange(first, first + queries, device=device)[:, None]


def valid_lengths(q: Tensor, mask: Tensor | None) -> list[int]:
    """Real tokens in each row."""
    return [q.shape[1]] * q.shape[0] if mask is None else mask.sum(1).tolist()


def check_pairing(rope_pairing: str) -> None:
    """Raise if the name of the pairing is unknown."""
    if rope_pairing not in PAIRINGS:
        raise FrankensteinError(f"unknown rope_pairing {rope_pairing!r}; known: {', '.join(PAIRINGS)}")


def _pairs(x: Tensor, rope_pairing: str) -> Tensor:
    """(..., T, H, K) to chunks (..., H, K/2, T, 2)."""
    check_pairing(rope_pairing)
    pairs = x.unflatten(-1, (2, -1)).mT if rope_pairing == "half" else x.unflatten(-1, (-1, 2))
    return pairs.movedim(-4, -2)
