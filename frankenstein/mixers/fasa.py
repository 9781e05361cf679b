"""FASA, frequency-aware sparse attention: Wang et al. 2026, https://arxiv.org/abs/2602.03152.

    alpha_ij = q_i . k_j = sum_f alpha_ij^(f),    alpha^(f) = the dot product in the two channels that RoPE turns at
                                                  frequency f (a frequency chunk)
    D    = the n_tip chunks of a head with the highest contextual agreement, from calibration data
    S_ij = sum over f in D of alpha_ij^(f)                           token importance prediction (TIP)
    o_i  = sum over j in TopN_fac(S_i.) of softmax_j(scale alpha_ij) v_j          focused attention (FAC)

It needs no training and has no gradient through the selection: train with `standard_attn`, evaluate with this. The
paper selects for one new token at a time, to read less of a cache; an encoder selects for all its queries, where the
selection itself is T^2 scores of 2 n_tip channels. On a CPU it is ahead of dense attention from about 2048 tokens.
Shapes: q, k (B, T, H, K), turned by RoPE; v (B, T, H, V); K/2 chunks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.kernels import selected_keys
from frankenstein.mixers.base import MIXERS, HeadProjections, Mixer, MixerContext, at_once, repeat_heads
from frankenstein.mixers.contextual_agreement import (
    best_chunks,
    check_pairing,
    chunk_scores,
    contextual_agreement,
    future,
    largest,
    valid_lengths,
)
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.options import option

_QUERIES = 32  # queries whose keys are gathered at once; they stay in the cache


def fasa_dense(  # noqa: PLR0913  as `fasa`
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dominant: Tensor,
    *,
    n_fac: int = 256,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    rope_pairing: str = "interleaved",
) -> tuple[Tensor, Tensor]:
    """The equations above, written out. Arguments as `fasa`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    allowed = _allowed(q, causal, mask)
    score = chunk_scores(q, k, rope_pairing)
    heads = torch.arange(q.shape[2], device=q.device)
    score = torch.stack([score[:, heads, f] for f in dominant.unbind(-1)]).sum(0).masked_fill(~allowed, float("-inf"))
    best = score.topk(min(n_fac, q.shape[1]), dim=-1).indices
    selected = torch.zeros_like(allowed.expand_as(score)).scatter(-1, best, True) & allowed
    logits = torch.einsum("bihk,bjhk->bhij", q, k) * scale
    weights = logits.masked_fill(~selected, float("-inf")).softmax(-1).nan_to_num()  # padded queries get 0
    return torch.einsum("bhij,bjhv->bihv", weights, v), selected


def fasa(  # noqa: PLR0913  the published interface
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dominant: Tensor,
    *,
    n_fac: int = 256,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    rope_pairing: str = "interleaved",
) -> tuple[Tensor, Tensor]:
    """`fasa_attention`, with the selection as a mask, which alone takes T^2 memory.

    Source: Wang et al. 2026, https://arxiv.org/abs/2602.03152.
    Returns:  output (B, T, H, V), selected (B, H, T, T) bool.
    """
    settings = _Settings(n_fac, causal, _scale(q, scale), _channels(dominant, q.shape[-1], rope_pairing))
    selected = torch.zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[1], dtype=torch.bool, device=q.device)
    outputs = []
    for example, length in enumerate(valid_lengths(q, mask)):
        chunks = list(_selected(q[example, :length], k[example, :length], v[example, :length], settings))
        for head, first, index, allowed, _ in chunks:
            rows = selected[example, head, first : first + len(index)]
            rows.scatter_(-1, index, torch.ones_like(index, dtype=torch.bool) if allowed is None else allowed)
        outputs.append(_join([o for *_, o in chunks], q, v, length))
    return torch.stack(outputs), selected


def fasa_attention(  # noqa: PLR0913  the published interface
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dominant: Tensor,
    *,
    n_fac: int = 256,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    rope_pairing: str = "interleaved",
) -> Tensor:
    """Softmax attention of every query on the n_fac keys with the highest scores in its head's dominant chunks.

    Only selected keys and values are read, by gathering. The scores are T^2 products of 2 n_tip channels; they are made
    and dropped for a few queries at a time, so that memory is linear in T.
    Source: Wang et al. 2026, https://arxiv.org/abs/2602.03152.
    Args:
        q, k: (B, T, H, K), already turned by position.
        v: (B, T, H, V).
        dominant: (H, n_tip) int64, chunks in 0 .. K/2 - 1; from `dominant_chunks`.
        n_fac: keys that a query attends to; at least T gives softmax attention.
        causal: query i selects among the keys j <= i only.
        mask: (B, T) bool, True for real tokens, which come first; padded rows of the output are 0.
        scale: of the dot products; None means K**-0.5.
        rope_pairing: chunk f is the channels (2f, 2f + 1), "interleaved", or (f, f + K/2), "half".
    Returns:  (B, T, H, V).
    """
    settings = _Settings(n_fac, causal, _scale(q, scale), _channels(dominant, q.shape[-1], rope_pairing))
    if q.shape[1] <= n_fac:
        o = softmax_attention(q, k, v, key_padding_mask=mask, causal=causal, scale=settings.scale)
        return o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)
    if not q.is_cpu:
        return _masked(q, k, v, settings, mask)
    outputs = []
    for example, length in enumerate(valid_lengths(q, mask)):
        row = q[example, :length], k[example, :length], v[example, :length]
        if length <= n_fac:
            o = softmax_attention(*(x[None] for x in row), causal=causal, scale=settings.scale)[0]
            outputs.append(F.pad(o, (0, 0, 0, 0, 0, q.shape[1] - length)))
        elif selected_keys.usable(*row):
            o = selected_keys.selected_attention(
                *row, settings.channels, count=n_fac, causal=causal, scale=settings.scale
            )
            outputs.append(F.pad(o, (0, 0, 0, 0, 0, q.shape[1] - length)))
        else:
            outputs.append(_join([o for *_, o in _selected(*row, settings)], q, v, length))
    return torch.stack(outputs)


@dataclass(frozen=True)
class _Settings:
    """What all rows share; `channels` (H, 2 n_tip) are those of the dominant chunks."""

    n_fac: int
    causal: bool
    scale: float
    channels: Tensor


def _selected(
    q: Tensor, k: Tensor, v: Tensor, s: _Settings
) -> Iterator[tuple[int, int, Tensor, Tensor | None, Tensor]]:
    """For one example (T, H, K): head, first query, selected keys (n, m), which of them are allowed, output."""
    length, dtype = q.shape[0], torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        for head, channels in enumerate(s.channels):
            query, key, value = (x[:, head].to(dtype).contiguous() for x in (q, k, v))
            tip_q, tip_k = (x.detach().index_select(1, channels) for x in (query, key))
            for first in range(0, length, _QUERIES):
                rows = slice(first, first + _QUERIES)
                seen = min(first + _QUERIES, length) if s.causal else length
                score = tip_q[rows] @ tip_k[:seen].T
                if s.causal:
                    score = score.masked_fill(future(first, len(score), seen, q.device), float("-inf"))
                index = largest(score, min(s.n_fac, seen))
                allowed = (score.gather(1, index) != float("-inf")) if s.causal else None
                yield head, first, index, allowed, _attend(query[rows], key, value, index, allowed, s).to(v.dtype)


def _masked(q: Tensor, k: Tensor, v: Tensor, s: _Settings, mask: Tensor | None) -> Tensor:
    """The same by fused attention under a mask of the selected pairs: what a GPU does faster than gathering."""
    (batch, length, heads, _), dtype = q.shape, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    channels = s.channels[None, :, None].expand(batch, -1, length, -1)
    tip_q, tip_k = (x.detach().to(dtype).gather(-1, channels) for x in (q, k))
    steps, outputs = torch.arange(length, device=q.device), []
    for rows in steps.split(max(1, at_once(q, length) // (batch * heads * length))):
        some = slice(int(rows[0]), int(rows[-1]) + 1)
        with torch.autocast(q.device.type, enabled=False):
            score = tip_q[:, :, some] @ tip_k.mT
        hidden = torch.zeros((), dtype=torch.bool, device=q.device) if mask is None else ~mask[:, None, None]
        hidden = hidden | (steps > rows[:, None]) if s.causal else hidden
        score = score.masked_fill(hidden, float("-inf"))
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, largest(score, s.n_fac), True) & ~hidden
        outputs.append(F.scaled_dot_product_attention(q[:, :, some], k, v, kept, scale=s.scale))
    o = torch.cat(outputs, 2).transpose(1, 2)
    return o if mask is None else o.masked_fill(~mask[:, :, None, None], 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, index: Tensor, allowed: Tensor | None, s: _Settings) -> Tensor:
    """Softmax attention (n, V) of queries (n, K) on their keys `index` (n, m) of k (T, K) and v (T, V)."""
    keys = k.index_select(0, index.flatten()).unflatten(0, index.shape)
    logits = (q[:, None] * s.scale) @ keys.mT
    if allowed is not None:
        logits = logits.masked_fill(~allowed[:, None], float("-inf"))
    # A weighted bag sums the values where they lie, without gathering them.
    return F.embedding_bag(index, v, per_sample_weights=logits[:, 0].softmax(-1), mode="sum")


def _join(chunks: list[Tensor], q: Tensor, v: Tensor, length: int) -> Tensor:
    """Chunks of queries, head by head, to (T, H, V); zero after `length`."""
    if not chunks:
        return v.new_zeros(v.shape[1:])
    o = torch.cat(chunks).unflatten(0, (q.shape[2], length)).transpose(0, 1)
    return F.pad(o, (0, 0, 0, 0, 0, q.shape[1] - length))


def _channels(dominant: Tensor, width: int, rope_pairing: str) -> Tensor:
    """(H, 2 n_tip): the channels of the dominant chunks."""
    check_pairing(rope_pairing)
    if rope_pairing == "half":
        return torch.cat([dominant, dominant + width // 2], -1)
    return torch.cat([2 * dominant, 2 * dominant + 1], -1)


def _allowed(q: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """Bool that broadcasts to (B, H, T, T); False in padded rows."""
    length = q.shape[1]
    allowed = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed.tril()
    return allowed if mask is None else allowed & mask[:, None, None, :] & mask[:, None, :, None]


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


@MIXERS.register("fasa_attn")
class FasaAttention(Mixer):
    """Multi-head softmax attention on selected tokens, for models trained with `standard_attn`; evaluation only.

    Source: Wang et al. 2026, https://arxiv.org/abs/2602.03152. The dominant chunks are state, not options: `calibrate`
    finds them. Rows of at most n_fac tokens are computed exactly and need none.
    """

    trainable: ClassVar[bool] = False
    positions: ClassVar[tuple[str, ...]] = ("rope",)

    @dataclass(frozen=True)
    class Options:
        """Options of `fasa_attn`."""

        n_tip: int = option(16, "Dominant frequencies a head that predict which tokens matter.", minimum=1)
        n_fac: int = option(256, "Tokens that each query attends to.", minimum=1)

    def __init__(self, context: MixerContext, options: Options) -> None:
        super().__init__(context, options)
        width = context.hidden_size // context.num_heads
        self.rope_pairing = _pairing_of(context, width)
        self.causal, self.num_heads, self.n_fac = context.causal, context.num_heads, options.n_fac
        self.project = HeadProjections(context, context.num_heads, 3, context.num_kv_heads)
        self.out = nn.Linear(context.hidden_size, context.hidden_size, bias=False)
        self.chunks, self.n_tip = width // 2, min(options.n_tip, width // 2)
        self.calibration: _Calibration | None = None
        self.dominant: Tensor
        self.calibrated: Tensor
        self.register_buffer("dominant", torch.arange(self.n_tip).repeat(context.num_heads, 1))
        self.register_buffer("calibrated", torch.tensor(False))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens."""
        if self.training:
            raise FrankensteinError(
                "fasa_attn runs in evaluation only: its choice of tokens has no gradient; train with standard_attn, "
                "whose weights it takes"
            )
        q, k, v = self.project(x)
        k, v = repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads)
        if self.calibration is not None:
            self.calibration.add(q, k, self.causal, mask, self.rope_pairing)
            o = softmax_attention(q, k, v, key_padding_mask=mask, causal=self.causal)
            return self.out(o.flatten(2))
        self._check_calibrated(x, mask)
        o = fasa_attention(
            q,
            k,
            v,
            self.dominant,
            n_fac=self.n_fac,
            causal=self.causal,
            mask=mask,
            rope_pairing=self.rope_pairing,
        )
        return self.out(o.flatten(2))

    def _check_calibrated(self, x: Tensor, mask: Tensor | None) -> None:
        if self.n_tip == self.chunks or x.shape[1] <= self.n_fac or self.calibrated:
            return
        longest = max(valid_lengths(x, mask))
        if longest > self.n_fac:
            raise FrankensteinError(
                f"fasa_attn met {longest} tokens, more than n_fac={self.n_fac}, and does not know its dominant "
                f"frequencies yet (n_tip={self.n_tip} of {self.chunks}); frankenstein.mixers.fasa.calibrate finds them"
            )


@dataclass
class _Calibration:
    """Sums of contextual agreement while `calibrate` runs."""

    top_k: int
    common: Tensor | int = 0
    count: int = 0

    def add(self, q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, rope_pairing: str) -> None:
        common, count = contextual_agreement(
            q, k, top_k=self.top_k, causal=causal, mask=mask, rope_pairing=rope_pairing
        )
        self.common, self.count = self.common + common, self.count + count


def calibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]], *, top_k: int | None = None) -> None:
    """Find the dominant chunks of every `fasa_attn` layer of a model, in place.

    The model runs with full attention on the batches; every layer keeps the chunks with the highest contextual
    agreement over all their tokens. If anything fails, the layers stay as they were.
    Source: Wang et al. 2026, https://arxiv.org/abs/2602.03152.
    Args:
        model: called as model(input_ids, attention_mask).
        batches: pairs (input_ids, attention_mask or None); rows need more than top_k tokens to count.
        top_k: tokens whose choice is compared; None means the layer's n_fac, the number that it will choose.
    Raises:   FrankensteinError: if the model has no such layer, or no row is long enough.
    """
    layers = [module for module in model.modules() if isinstance(module, FasaAttention)]
    if not layers:
        raise FrankensteinError("calibrate: the model has no fasa_attn layer")
    if top_k is not None and top_k < 1:
        raise FrankensteinError(f"calibrate: top_k={top_k}; expected at least 1 token")
    training = model.training
    model.eval()
    records = [_Calibration(layer.n_fac if top_k is None else top_k) for layer in layers]
    try:
        for layer, record in zip(layers, records, strict=True):
            layer.calibration = record
        with torch.no_grad():
            for input_ids, attention_mask in batches:
                model(input_ids, attention_mask)
    finally:
        for layer in layers:
            layer.calibration = None
        model.train(training)
    found = [
        best_chunks(torch.as_tensor(r.common), r.count, x.n_tip, r.top_k) for x, r in zip(layers, records, strict=True)
    ]
    for layer, dominant in zip(layers, found, strict=True):
        layer.dominant.copy_(dominant)
        layer.calibrated.fill_(True)


def _pairing_of(context: MixerContext, width: int) -> str:
    """Which channel the rotation mixes with the first one."""
    if context.rotary is None:
        raise FrankensteinError("fasa_attn chooses tokens by the frequencies of RoPE: it needs model.positions: rope")
    first = torch.zeros(1, 2, 1, width)
    first[..., 0] = 1.0
    turned = context.rotary(first)[0, 1, 0]
    return "interleaved" if turned[1] != 0 else "half"
