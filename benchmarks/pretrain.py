"""Pretraining speed of whole encoders, beside the BERT and ModernBERT of transformers in the same run.

    python -m benchmarks.pretrain --peers --rounds 15 --out benchmarks/results/pretrain_cpu.json
    python -m benchmarks.pretrain --peers --precision bfloat16 --compile
    python -m benchmarks.pretrain --peers "ModernBERT, sparse_prediction" --models standard_attn
    python -m benchmarks.pretrain --threads 1 --clock cpu          on a machine with other load

Every encoder takes the same optimizer step on the same masked batch of packed rows: clear the gradients, forward, loss,
backward, clip to norm 1, fused AdamW. They take turns, one step each a round, and each round starts with another one;
`ratios` compares medians. Ours run as the pipeline trains: no padding mask, deterministic operations, and the
last feed-forward and the head see the masked positions only. `head` says what the others compute: BERT and ModernBERT
predict all tokens by default, ModernBERT with sparse_prediction the masked ones.

Ours: `standard_attn` has softmax attention in every layer and BERT's size, `standard_attn_narrow` a feed-forward of 3 D
and so ModernBERT's size; `default` has the layer pattern of the schema's defaults; `seed002` is the stable pattern of
that paper: 12 layers traversed twice, experts, ternary weights, dynamic tanh.

`mfu` is the rate of the matrix products that a step really runs (counted by torch, attention's included), over that of
one large product of the same number type on this machine. A head on all tokens thus raises it without any use.
`bfloat16_gradients` has the gradient norms of the first steps under bfloat16, on one row, before clipping; each must
be finite.
On a CPU `threads_used` is CPU time over wall time and threads. Much below 1, other processes took the cores: then
nothing is stored.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.machine import describe, seconds
from frankenstein import build_encoder, build_optimizer, convert_to_bitlinear, load_params
from frankenstein.runtime import prepare_torch
from frankenstein.text.masking import MaskingRule, mask_rows

STABLE = ["retnet", "titan_attn", "retnet", "mamba", "titan_attn", "ode"]  # seed 002
CLIP = 1.0
SPECIAL_IDS, MASK_ID = (0, 1, 2, 3, 4), 4
WARM_UP = 2  # rounds before those that count
LEAST_USED = 0.6  # of the threads; a machine of one's own gives more, two threads on one core give 0.5
PEERS = ("BERT", "BERT, dropout 0", "ModernBERT", "ModernBERT, sparse_prediction")
OURS = ("standard_attn", "standard_attn_narrow", "default", "seed002")
ALL_TOKENS, MASKED = "all tokens", "masked tokens"


class Taken(NamedTuple):
    """Seconds of one step: by the clock, and of the process's CPU time."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Batch:
    """One masked batch; N positions are masked."""

    inputs: Tensor  # (B, T), masks put in
    positions: Tensor  # (N,), into the flattened (B T)
    labels: Tensor  # (N,)
    all_labels: Tensor  # (B, T), -100 where nothing is predicted: what transformers takes


@dataclass
class Side:
    """One encoder in the comparison: its loss on the batch, and what is known about it."""

    name: str
    head: str
    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[], Tensor]
    deterministic: bool = False
    flops: int = 0  # of the matrix products in a step

    @property
    def parameters(self) -> int:
        """Number of parameters, shared ones once."""
        return sum(p.numel() for p in self.model.parameters())

    def gradients(self, autocast: AbstractContextManager[Any]) -> Tensor:
        """Fresh gradients; returns the loss."""
        torch.use_deterministic_algorithms(self.deterministic)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = self.loss()
        loss.backward()
        return loss.detach()

    def step(self, autocast: AbstractContextManager[Any]) -> Tensor:
        """One optimizer step; returns the gradient norm before clipping."""
        self.gradients(autocast)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return norm


def draw_batch(rows: int, length: int, vocab_size: int, share: float, device: torch.device) -> Batch:
    """Random tokens, masked as in pretraining."""
    generator = np.random.default_rng(0)
    ids = generator.integers(len(SPECIAL_IDS), vocab_size, (rows, length))
    rule = MaskingRule(mask_id=MASK_ID, special_ids=SPECIAL_IDS, vocab_size=vocab_size, probability=share)
    inputs, chosen = mask_rows(ids, rule, seed=0, step=0)
    arrays = (inputs, np.flatnonzero(chosen), ids[chosen], np.where(chosen, ids, -100))
    return Batch(*(torch.from_numpy(array).to(device) for array in arrays))


def options_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """`model.*` options of one of our encoders."""
    width = args.width
    common = {
        "vocab_size": args.vocab_size,
        "hidden_size": width,
        "num_heads": args.heads,
        "retention_heads": args.heads,
    }
    if name == "seed002":
        return {
            **common, "ffn_hidden_size": 2 * width, "num_layers": 12, "num_loops": 2, "layer_pattern": STABLE,
            "norm_type": "dynamic_tanh", "use_bitnet": True, "use_moe": True, "num_experts": 4, "top_k_experts": 2,
        }  # fmt: skip
    pattern = {} if name == "default" else {"layer_pattern": ["standard_attn"]}
    inner = 3 * width if name == "standard_attn_narrow" else 4 * width
    return {**common, "ffn_hidden_size": inner, "num_layers": args.layers, **pattern}


def ours(name: str, batch: Batch, args: argparse.Namespace) -> Side:
    """An encoder of this library as the pipeline trains it."""
    overrides = {f"model.{key}": value for key, value in options_of(name, args).items()}
    overrides |= {"training.max_length": args.length, "tokenizer.byte_fallback": False}  # any vocabulary size
    params = load_params(None, overrides)
    encoder = build_encoder(params)
    if params.model.use_bitnet:
        convert_to_bitlinear(encoder)
    encoder = encoder.to(batch.inputs.device).train()

    def loss() -> Tensor:
        hidden = encoder(batch.inputs, None, batch.positions)
        cross_entropy = F.cross_entropy(encoder.mlm_logits(hidden).float(), batch.labels)
        return cross_entropy + sum(encoder.losses().values())

    return Side(name, MASKED, encoder, build_optimizer(encoder, params), loss, deterministic=True)


def peer(name: str, batch: Batch, args: argparse.Namespace) -> Side:
    """A model of transformers of the same width, depth and heads, with scaled_dot_product_attention.

    ModernBERT's feed-forward is gated, so that half the width gives it 3/4 of the parameters of the others'.
    """
    import transformers

    shape = {
        "vocab_size": args.vocab_size, "hidden_size": args.width, "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads, "max_position_embeddings": max(512, args.length),
    }  # fmt: skip
    torch.manual_seed(0)
    if name.startswith("ModernBERT"):
        special = {f"{token}_token_id": i for i, token in enumerate(("pad", "bos", "cls", "eos", "sep"))}
        sparse = name.endswith("sparse_prediction")
        config = transformers.ModernBertConfig(
            **shape, **special, intermediate_size=2 * args.width, sparse_prediction=sparse, attn_implementation="sdpa"
        )
        model, head = transformers.ModernBertForMaskedLM(config), MASKED if sparse else ALL_TOKENS
    else:
        rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name.endswith("dropout 0") else {}
        config = transformers.BertConfig(**shape, **rates, intermediate_size=4 * args.width, attn_implementation="sdpa")
        model, head = transformers.BertForMaskedLM(config), ALL_TOKENS
    model = model.to(batch.inputs.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    return Side(name, head, model, optimizer, lambda: model(input_ids=batch.inputs, labels=batch.all_labels).loss)


def product_flops(side: Side, autocast: AbstractContextManager[Any]) -> int:
    """FLOPs of all matrix products in one forward and backward pass, fused attention on the CPU included."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        side.gradients(autocast)
    return counter.get_total_flops()


def bfloat16_norms(name: str, batch: Batch, args: argparse.Namespace, steps: int = 3) -> list[float]:
    """Gradient norms of the first steps under bfloat16, from a fresh encoder; not finite ones stay what they are."""
    side = ours(name, batch, args)
    return [side.step(torch.autocast(args.device, torch.bfloat16)).item() for _ in range(steps)]


def timed(work: Callable[[], object], device: torch.device) -> Taken:
    """Both times of one call."""
    start = time.process_time()
    wall = seconds(work, device)
    return Taken(wall, time.process_time() - start)


def take_turns(works: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[Taken]]:
    """Times of `rounds` calls of each, one each a round, after the warm-up; each round starts with another one."""
    names = list(works)
    times: dict[str, list[Taken]] = {name: [] for name in names}
    for turn in range(rounds + WARM_UP):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken = timed(works[name], device)
            if turn >= WARM_UP:
                times[name].append(taken)
    return times


def peak_rate(device: torch.device, kind: torch.dtype, clock: str) -> float:
    """FLOPs a second (a CPU-second) of the best of five products of large square matrices."""
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.linspace(-1, 1, size * size, device=device).reshape(size, size).to(kind)
    taken = [timed(lambda: torch.mm(matrix, matrix), device) for _ in range(6)][1:]
    return 2.0 * size**3 / min(getattr(t, clock) for t in taken)


def figures(side: Side, taken: list[Taken], tokens: int, peak: float, args: argparse.Namespace) -> dict[str, Any]:
    """What is stored of one side; speed and MFU by the chosen clock."""
    wall, cpu = median(t.wall for t in taken), median(t.cpu for t in taken)
    times = [getattr(t, args.clock) for t in taken]
    second = median(times)
    return {
        "model": side.name,
        "head": side.head,
        "parameters": side.parameters,
        "gflop_per_token": round(side.flops / tokens / 1e9, 5),
        "step_s": second,
        "step_s_lowest": min(times),
        "tokens_per_s": round(tokens / second, 1),
        "mfu": round(side.flops / second / peak, 4),
        "threads_used": round(cpu / wall / args.threads, 3) if args.device == "cpu" else None,
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours -> peer -> how many times its speed ours has."""
    speed = {row["model"]: 1.0 / row["step_s"] for row in rows}
    peers = [name for name in speed if name not in OURS]
    return {name: {p: round(speed[name] / speed[p], 3) for p in peers} for name in speed if name in OURS and peers}


def disturbed(rows: list[dict[str, Any]], clock: str) -> list[str]:
    """Models during whose steps other processes had the cores; by CPU time that does not matter."""
    used = {row["model"]: row["threads_used"] for row in rows}
    return [name for name, share in used.items() if clock == "wall" and share is not None and share < LEAST_USED]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All sides in one run, and what the figures were measured on."""
    prepare_torch(args.threads)
    device = torch.device(args.device)
    kind = torch.bfloat16 if args.precision == "bfloat16" else torch.float32
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=kind == torch.bfloat16)
    batch = draw_batch(args.rows, args.length, args.vocab_size, args.masked_share, device)
    row = draw_batch(1, args.length, args.vocab_size, args.masked_share, device)
    norms = {name: bfloat16_norms(name, row, args) for name in args.models} if args.check_bfloat16 else {}
    sides = [ours(name, batch, args) for name in args.models]
    sides += [peer(name, batch, args) for name in args.peers]
    for side in sides:
        side.flops = product_flops(side, autocast)
        side.loss = torch.compile(side.loss) if args.compile else side.loss
    times = take_turns({s.name: lambda s=s: s.step(autocast) for s in sides}, args.rounds, device)
    peak, tokens = peak_rate(device, kind, args.clock), args.rows * args.length
    rows = [figures(side, times[side.name], tokens, peak, args) for side in sides]
    return {
        "command": shlex.join(["python", "-m", "benchmarks.pretrain", *sys.argv[1:]]),
        "machine": describe() | ({"transformers": _transformers_version()} if args.peers else {}),
        "precision": args.precision,
        "compiled": args.compile,
        "clock": args.clock,
        "rows": args.rows,
        "length": args.length,
        "masked_tokens": len(batch.labels),
        "rounds": args.rounds,
        "peak_gflop_per_s": round(peak / 1e9, 1),
        "bfloat16_gradients": norms,
        "models": rows,
        "ratios": ratios(rows),
    }


def _transformers_version() -> str:
    import transformers

    return str(transformers.__version__)


def show(record: dict[str, Any]) -> None:
    """Print the table."""
    unit = "CPU-second" if record["clock"] == "cpu" else "second"
    print(f"{record['precision']}{', compiled' if record['compiled'] else ''}; tokens per {unit}; "
          f"peak {record['peak_gflop_per_s']} GFLOP/s")  # fmt: skip
    print(f"{'model':32}{'head':15}{'M param.':>9}{'GFLOP/token':>13}{'tokens':>9}{'MFU':>7}{'threads used':>14}")
    for row in record["models"]:
        used = "-" if row["threads_used"] is None else f"{row['threads_used']:.2f}"
        print(
            f"{row['model']:32}{row['head']:15}{row['parameters'] / 1e6:9.2f}{row['gflop_per_token']:13.4f}"
            f"{row['tokens_per_s']:9.0f}{row['mfu']:7.2f}{used:>14}"
        )
    for name, against in record["ratios"].items():
        print(f"{name}: " + ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in against.items()))
    for name, norms in record["bfloat16_gradients"].items():
        finite = sum(map(math.isfinite, norms))
        print(f"{name}: gradients finite in {finite} of {len(norms)} bfloat16 steps, norms {norms}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(OURS), choices=OURS, help="ours that take part")
    parser.add_argument(
        "--peers", nargs="*", default=None, choices=PEERS, metavar="PEER",
        help=f"models of transformers, which must be installed, to compare with: {', '.join(PEERS)}; none named: all",
    )  # fmt: skip
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="bfloat16 autocasts")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss of every side")
    parser.add_argument("--rows", type=int, default=16, help="rows B of the batch")
    parser.add_argument("--length", type=int, default=128, help="tokens T of a row")
    parser.add_argument("--masked-share", type=float, default=0.15, help="share of tokens that is predicted")
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--width", type=int, default=256, help="hidden width D")
    parser.add_argument("--layers", type=int, default=6, help="layers; seed002 always has 12, traversed twice")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9, help="counted steps of each")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="what speed and ratios are taken from")
    parser.add_argument(
        "--check-bfloat16", action=argparse.BooleanOptionalAction, default=True, help="are bfloat16 gradients finite?"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    args = parser.parse_args()
    args.peers = [] if args.peers is None else args.peers or list(PEERS)
    if args.peers and find_spec("transformers") is None:
        parser.error("--peers needs transformers, which is not installed: pip install transformers")
    if args.clock == "cpu" and args.device == "cuda":
        parser.error("--clock cpu measures nothing on a GPU")
    return args


def main() -> None:
    """Measure, print a table, store the figures."""
    args = parse()
    if not args.peers:
        print("without --peers: ours only, nothing to compare with")
    record = measure(args)
    show(record)
    if busy := disturbed(record["models"], args.clock):
        raise SystemExit(
            f"other processes had the cores during the steps of {', '.join(busy)}: nothing stored. "
            "Measure on a quiet machine, or with --threads 1 --clock cpu"
        )
    bad = [name for name, norms in record["bfloat16_gradients"].items() if not all(map(math.isfinite, norms))]
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if bad:
        raise SystemExit(f"bfloat16 gradients are not finite: {', '.join(bad)}")


if __name__ == "__main__":
    main()
