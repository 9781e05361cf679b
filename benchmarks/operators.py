"""The recurrent operators' fast forms beside their plain recurrences, and sparse operators beside dense attention.

    python -m benchmarks.operators --out benchmarks/results/operators_cpu.json
    python -m benchmarks.operators --peers      # also transformers' chunked gated delta rule, where it is installed

Forward and backward, float32. Recurrences: one way, B = 1, T = 512, so that the plain form ends in reasonable time.
Sparse operators: both ways, B = 1, T = 4096, about a tenth of the pairs kept, beside torch's fused dense attention;
sparge and fasa, which only run in evaluation, forward only, and so is dense attention beside them.
"""

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import describe, paired
from frankenstein.mixers import delta_rule, gla, griffin, hgrn2, kda, retnet, selective_scan, simple_gla, titans_memory
from frankenstein.mixers.bigbird import bigbird_attention, bigbird_mask
from frankenstein.mixers.fasa import fasa_attention
from frankenstein.mixers.longformer import longformer_attention, longformer_mask
from frankenstein.mixers.nsa import nsa_bidirectional
from frankenstein.mixers.sparge import sparge_attention, sparge_block_map
from frankenstein.mixers.sparse_transformer import sparse_transformer_attention, sparse_transformer_mask
from frankenstein.mixers.sparsek import Selection, sparsek_attention
from frankenstein.runtime import prepare_torch

Make = Callable[[int, int, int, int], tuple[Tensor, ...]]  # (B, T, H, K) -> the operator's tensors
STATES = 16  # N of the selective scan


def _vectors(count: int, *shape: int) -> list[Tensor]:
    """Normal tensors; keys (the second) have unit length, as the delta rules want them."""
    made = [torch.randn(*shape) for _ in range(count)]
    if count > 1:
        made[1] = F.normalize(made[1], dim=-1)
    return made


def _gates(count: int, *shape: int) -> list[Tensor]:
    """Values in (0, 1)."""
    return [torch.rand(*shape) * 0.98 + 0.01 for _ in range(count)]


def _log_decay(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(*shape) + 3.0)


def _retention(b: int, t: int, h: int, k: int) -> tuple[Tensor, ...]:
    return (*_vectors(3, b, t, h, k), retnet.retention_decay(h).float())


def _scan(b: int, t: int, h: int, k: int) -> tuple[Tensor, ...]:
    width = h * k
    u, delta = torch.randn(b, t, width), F.softplus(torch.randn(b, t, width) - 2.0)
    return u, delta, -torch.rand(width, STATES) * STATES - 0.1, torch.randn(b, t, STATES), torch.randn(b, t, STATES)


RECURRENCES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Make]] = {
    "retention": (retnet.retention_recurrent, retnet.retention, _retention),
    "simple_gla": (
        simple_gla.simple_gla_recurrent,
        simple_gla.simple_gla,
        lambda b, t, h, k: (*_vectors(3, b, t, h, k), _log_decay(b, t, h)),
    ),
    "gla": (gla.gla_recurrent, gla.gla, lambda b, t, h, k: (*_vectors(3, b, t, h, k), _log_decay(b, t, h, k))),
    "hgrn2": (
        hgrn2.hgrn2_recurrent,
        hgrn2.hgrn2,
        lambda b, t, h, k: (torch.randn(b, t, h, k), torch.randn(b, t, h, k) + 3.0, torch.randn(b, t, h, k)),
    ),
    "delta_rule": (
        delta_rule.delta_rule_recurrent,
        delta_rule.delta_rule,
        lambda b, t, h, k: (*_vectors(3, b, t, h, k), *_gates(1, b, t, h)),
    ),
    "gated_delta_rule": (
        delta_rule.gated_delta_rule_recurrent,
        delta_rule.gated_delta_rule,
        lambda b, t, h, k: (*_vectors(3, b, t, h, k), _log_decay(b, t, h), *_gates(1, b, t, h)),
    ),
    "kda": (
        kda.kda_recurrent,
        kda.kda,
        lambda b, t, h, k: (*_vectors(3, b, t, h, k), _log_decay(b, t, h, k), *_gates(1, b, t, h)),
    ),
    "selective_scan": (selective_scan.selective_scan_recurrent, selective_scan.selective_scan, _scan),
    "rg_lru": (
        griffin.rg_lru_recurrent,
        griffin.rg_lru,
        lambda b, t, h, k: (*(torch.randn(b, t, h * k) for _ in range(3)), torch.randn(h * k)),
    ),
    "titans_memory": (
        titans_memory.titans_memory_recurrent,
        titans_memory.titans_memory,
        lambda b, t, h, k: (*_vectors(3, b, t, h, k), *(0.1 * g for g in _gates(2, b, t, h)), *_gates(1, b, t, h)),
    ),
}


def passes(operator: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[[], None]:
    """Forward and backward through the operator's first result."""
    leaves = [t.clone().requires_grad_() for t in tensors]

    def run() -> None:
        result = operator(*leaves)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
        for leaf in leaves:
            leaf.grad = None

    return run


def evaluations(operator: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Callable[[], None]:
    """Forward only."""

    @torch.no_grad()
    def run() -> None:
        operator(*tensors)

    return run


def recurrence_rows(heads: int, width: int, length: int, runs: int) -> list[dict[str, Any]]:
    """Fast and plain form of each recurrence, in turn."""
    rows = []
    for name, (plain, fast, make) in RECURRENCES.items():
        torch.manual_seed(0)
        tensors = make(1, length, heads, width // heads)
        quick, slow = paired(passes(fast, tensors), passes(plain, tensors), torch.device("cpu"), runs)
        rows.append(_row(name, length, quick, slow, "plain"))
    return rows


@dataclass(frozen=True)
class Sparse:
    """A sparse operator on its tensors, of which the first three are q, k and v, and the share of pairs it keeps."""

    operator: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    kept: float
    trains: bool = True


def sparse_cases(heads: int, width: int, length: int) -> dict[str, Sparse]:
    """Every sparse operator with about a tenth of the pairs; those that only run in evaluation do not train."""
    torch.manual_seed(0)
    qkv = tuple(torch.randn(1, length, heads, width // heads) for _ in range(3))
    return {
        **_fixed_patterns(qkv),
        "sparsek": _sparsek(qkv),
        "nsa": _nsa(qkv),
        "sparge": _sparge(qkv),
        "fasa": _fasa(qkv),
    }


def _fixed_patterns(qkv: tuple[Tensor, ...]) -> dict[str, Sparse]:
    length, heads = qkv[0].shape[1:3]
    block, window, stride = 64, length // 11, round(length**0.5 * 3)
    blocks = length // block
    chosen = torch.stack([_far_blocks(blocks, 1) for _ in range(heads)])
    masks = {
        "longformer": longformer_mask(length, window_size=window, global_tokens=range(8)),
        "bigbird": bigbird_mask(length, block_size=block, rand_blocks=chosen),
        "sparse_transformer": sparse_transformer_mask(length, pattern="strided", stride=stride, causal=False),
    }
    operators: dict[str, Callable[..., Any]] = {
        "longformer": partial(longformer_attention, window_size=window, num_global=8),
        "bigbird": lambda q, k, v: bigbird_attention(q, k, v, chosen, block_size=block),
        "sparse_transformer": partial(sparse_transformer_attention, pattern="strided", stride=stride),
    }
    return {name: Sparse(operators[name], qkv, mask.float().mean().item()) for name, mask in masks.items()}


def _sparsek(qkv: tuple[Tensor, ...]) -> Sparse:
    length, heads = qkv[0].shape[1:3]
    selection = Selection(top_k=length // 20, window_size=length // 20)
    operator = partial(sparsek_attention, selection=selection)
    return Sparse(operator, (*qkv, torch.randn(1, length, heads)), (selection.top_k + selection.window_size) / length)


def _nsa(qkv: tuple[Tensor, ...]) -> Sparse:
    """Blocks of 64 tokens: means of all, a window of two, and selected ones for the rest."""
    length, heads = qkv[0].shape[1:3]
    size = 64
    counts = max(4, (length // 10 - length // size) // size - 2)
    operator = partial(nsa_bidirectional, block_size=size, block_counts=counts, window_size=2 * size)
    gates = _gates(3, 1, length, heads)
    return Sparse(operator, (*qkv, *gates), (size * (counts + 2) + length // size) / length)


def _sparge(qkv: tuple[Tensor, ...]) -> Sparse:
    """Neighbours are alike, as the method needs them; the kept blocks are a tenth."""
    length, heads = qkv[0].shape[1:3]
    topics = torch.randn(1, -(-length // 128), heads, qkv[0].shape[-1]).repeat_interleave(128, 1)[:, :length]
    tensors = (topics + 0.5 * qkv[0], topics + 0.5 * qkv[1], qkv[2])
    kept = sparge_block_map(*tensors[:2], topk=0.1).float().mean().item()
    return Sparse(partial(sparge_attention, topk=0.1), tensors, kept, trains=False)


def _fasa(qkv: tuple[Tensor, ...]) -> Sparse:
    """Half of the frequencies choose a tenth of the tokens."""
    length, heads, width = qkv[0].shape[1:]
    dominant = torch.stack([torch.randperm(width // 2)[: width // 4] for _ in range(heads)])
    operator = partial(fasa_attention, dominant=dominant, n_fac=length // 10)
    return Sparse(operator, qkv, length // 10 / length, trains=False)


def sparse_rows(heads: int, width: int, length: int, runs: int) -> list[dict[str, Any]]:
    """Sparse operators beside dense attention on the same q, k and v, in turn."""
    rows = []
    for name, case in sparse_cases(heads, width, length).items():
        work = passes if case.trains else evaluations
        mine, dense = work(case.operator, case.tensors), work(_dense, case.tensors[:3])
        taken, beside = paired(mine, dense, torch.device("cpu"), runs)
        row = _row(name, length, taken, beside, "dense")
        rows.append({**row, "kept_pairs": round(case.kept, 3), "forward_only": not case.trains})
    return rows


def peer_rows(heads: int, width: int, length: int, runs: int) -> list[dict[str, Any]]:
    """transformers' chunked gated delta rule beside ours; an empty list where transformers is not installed."""
    try:
        module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    except ImportError as error:
        print(f"transformers is not installed ({error}); its gated delta rule is left out")
        return []
    torch.manual_seed(0)
    tensors = RECURRENCES["gated_delta_rule"][2](4, length, heads, width // heads)
    theirs = passes(module.torch_chunk_gated_delta_rule, tensors)
    taken, beside = paired(passes(delta_rule.gated_delta_rule, tensors), theirs, torch.device("cpu"), runs)
    return [_row("gated_delta_rule", length, taken, beside, "transformers torch_chunk_gated_delta_rule")]


def _far_blocks(blocks: int, count: int) -> Tensor:
    """For each inner query block, key blocks outside of its window and of the global ones: (blocks - 2, count)."""
    rows = []
    for i in range(1, blocks - 1):
        far = [j for j in range(1, blocks - 1) if abs(i - j) > 1]
        rows.append(torch.tensor(far)[torch.randperm(len(far))[:count]])
    return torch.stack(rows)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def _row(name: str, length: int, taken: float, beside: float, other: str) -> dict[str, Any]:
    row = {
        "operator": name,
        "length": length,
        "seconds": round(taken, 5),
        "beside": other,
        "beside_seconds": round(beside, 5),
        "times_faster": round(beside / taken, 2),
    }
    print(f"{name:20} T {length:5}  {1e3 * taken:9.1f} ms   {other} {1e3 * beside:9.1f} ms   {beside / taken:7.2f} x")
    return row


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="hidden width, all heads")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="T of the recurrences")
    parser.add_argument("--sparse-length", type=int, default=4096, help="T of the sparse operators")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each, after a warm-up")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--peers", action="store_true", help="also transformers' gated delta rule")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    args = parser.parse_args()
    prepare_torch(args.threads)
    shape = (args.heads, args.width)
    record = {
        "machine": describe(),
        "width": args.width,
        "heads": args.heads,
        "runs": args.runs,
        "recurrences": recurrence_rows(*shape, args.length, args.runs),
        "sparse": sparse_rows(*shape, args.sparse_length, args.runs),
        "peers": peer_rows(*shape, args.length, args.runs) if args.peers else [],
    }
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
