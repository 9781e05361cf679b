"""Sparse mixture of experts in place of the dense feed-forward.

    p = softmax(W_g x)      y = sum_{i in TopK(p)} g_i E_i(x)      g_i = p_i / sum_{j in TopK(p)} p_j
    balance = weight N sum_i f_i P_i      f_i share of the assignments that expert i gets, P_i mean of p_i over tokens

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Fedus et al. 2022 (Switch Transformer), section 2.2,
https://arxiv.org/abs/2101.03961; seed 002 eq. 38-45. Where we differ and why:
- K = 1 keeps g = p, as the Switch Transformer does: renormalized it would be 1, and the router would learn nothing.
- f counts all K choices (seed eq. 43 is its K = 1), since an expert's load comes from all of them.
- An expert has room for ceil(capacity K T / N) tokens (Lepikhin et al. 2020, https://arxiv.org/abs/2006.16668); seed
  eq. 45 is the K = 1 form, which for K = 2 would drop a third of the assignments even in perfect balance.
- Capacity holds in training only: with it a token's result depends on the others in its batch.
Shapes: n real tokens, N experts, K choices.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.model.feed_forward import FeedForward
from frankenstein.model.options import ModelOptions

_INIT_STD = 0.02


@dataclass(frozen=True)
class Routing:
    """How the tokens of one pass were routed.

    `importance` (N,) is the mean probability of each expert, `load` (N,) its share of the assignments before capacity,
    `dropped` () the share of assignments that capacity refused; `balance` () is the weighted loss.
    """

    importance: Tensor
    load: Tensor
    dropped: Tensor
    balance: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> "Routing":
        """A copy outside of the pass's graph, which cannot be copied."""
        return Routing(*(x.detach().clone() for x in (self.importance, self.load, self.dropped, self.balance)))


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The K best experts of every token; equal ones in the order of their numbers.

    Args:
        logits: (n, N).
    Returns:  probabilities (n, N); chosen experts (n, K), best first; their gates (n, K).
    """
    probabilities = logits.softmax(-1)
    best, chosen = probabilities.sort(dim=-1, descending=True, stable=True)
    gates, chosen = best[:, :top_k], chosen[:, :top_k]
    return probabilities, chosen, gates if top_k == 1 else gates / gates.sum(-1, keepdim=True)


def balance_loss(probabilities: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N sum_i f_i P_i: 1 in balance, N when every token goes to one expert. Its gradient flows through P alone.

    Source: Fedus et al. 2022, eq. 4-6, https://arxiv.org/abs/2101.03961; seed 002 eq. 42-44.
    Args:
        probabilities: (n, N); chosen: (n, K).
    Returns:  the loss (), P (N,) and f (N,).
    """
    num_experts = probabilities.shape[-1]
    importance = probabilities.sum(0) / max(1, len(probabilities))
    load = torch.bincount(chosen.flatten(), minlength=num_experts).to(importance.dtype) / max(1, chosen.numel())
    return num_experts * (importance * load).sum(), importance, load


def _slots(groups: list[Tensor], filled: list[Tensor], count: int) -> tuple[Tensor, Tensor | None]:
    """Where the result of each of `count` assignments stands among those of all experts.

    Returns:  (count,) integers, and (count,) with 1, or 0 for dropped ones, which point anywhere; None where none is
    dropped.
    """
    starts = [0, *accumulate(len(group) for group in filled)]
    device = groups[0].device
    places = [torch.arange(start, start + len(g), device=device) for start, g in zip(starts, groups, strict=False)]
    assignments = torch.cat(groups)
    slots = torch.zeros(count, dtype=torch.long, device=device).index_copy(0, assignments, torch.cat(places))
    if len(assignments) == count:
        return slots, None
    return slots, torch.zeros(count, device=device).index_fill(0, assignments, 1.0)


def _fill(x: Tensor, count: int) -> int:
    """Rows, whose results are dropped, to add to an expert's so that their number is a multiple of 64.

    Under autocast on a CPU, each new shape of a product costs the compilation of its kernel: 1.5 ms where the product
    itself takes 0.1 (measured, bfloat16 with AMX).
    """
    return -count % 64 if x.is_cpu and torch.is_autocast_enabled("cpu") else 0


class MixtureOfExperts(nn.Module):
    """Feed-forward of N experts, each token through its K best ones.

    The router is a plain parameter and computes in full precision also under autocast and in ternary encoders (Fedus et
    al. 2022, section 2.4). Padding is never routed, counted or given room, and comes out as 0.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        width, inner = options.hidden_size, options.ffn_hidden_size
        self.top_k = options.top_k_experts
        self.capacity_factor, self.balance_weight = options.expert_capacity_factor, options.expert_balance_weight
        self.router = nn.Parameter(torch.empty(options.num_experts, width).normal_(std=_INIT_STD))
        self.experts = nn.ModuleList(
            FeedForward(width, inner, options.ffn_activation) for _ in range(options.num_experts)
        )
        self.routing: Routing | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); mask (B, T), True for real tokens. `routing` tells how this pass went."""
        rows = x.flatten(0, 1)
        real = None if mask is None else mask.flatten().nonzero()[:, 0]
        tokens = rows if real is None else rows.index_select(0, real)
        probabilities, chosen, gates = route(self._logits(tokens), self.top_k)
        groups, dropped = self._groups(chosen)
        loss, importance, load = balance_loss(probabilities, chosen)
        self.routing = Routing(importance.detach(), load, dropped, self.balance_weight * loss)
        filled = [F.pad(group, (0, _fill(rows, len(group)))) for group in groups]
        places = torch.cat(filled) % max(1, len(tokens))
        inputs = tokens.index_select(0, places).split([len(group) for group in filled])
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, inputs, strict=True)])
        slots, kept = _slots(groups, filled, chosen.numel())
        weights = gates.T.flatten() if kept is None else gates.T.flatten() * kept
        found = outputs.index_select(0, slots) * weights[:, None]
        y = found.view(self.top_k, *tokens.shape).sum(0).to(x.dtype)
        if real is not None:
            y = torch.zeros_like(rows).index_copy(0, real, y)
        return y.view_as(x)

    def _logits(self, tokens: Tensor) -> Tensor:
        """(n, N) in float32 at least."""
        with torch.autocast(tokens.device.type, enabled=False):
            exact = torch.float64 if tokens.dtype == torch.float64 else torch.float32
            return F.linear(tokens.to(exact), self.router.to(exact))

    def _groups(self, chosen: Tensor) -> tuple[list[Tensor], Tensor]:
        """Each expert's assignments, choice * n + token, and the share of all that is dropped.

        Where room is short, first choices go before second ones, and earlier tokens before later ones.
        """
        by_choice = chosen.T.flatten()
        order = by_choice.argsort(stable=True)
        counts = torch.bincount(by_choice, minlength=len(self.experts)).tolist()
        groups = list(order.split(counts))
        if self.training:
            room = math.ceil(self.capacity_factor * chosen.numel() / len(self.experts))
            groups = [group[:room] for group in groups]
        kept = sum(len(group) for group in groups)
        return groups, torch.tensor(1.0 - kept / max(1, chosen.numel()), device=chosen.device)
