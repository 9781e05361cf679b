"""Speed, scaling and memory of every mixer's layer, forward and backward, beside softmax attention in the same run.

    python -m benchmarks.mixers --out benchmarks/results/mixers_cpu.json
    python -m benchmarks.mixers --mixers gla_attn mamba --lengths 512 2048 --runs 5
    python -m benchmarks.mixers --device cuda --precision bfloat16 --lengths 512 2048 8192 --tokens 65536

Every pass has the same number of tokens, so a layer that is linear in T keeps its tokens per second.
`exponent` is the slope of log(seconds a row) over log T, least squares over all lengths. `saved_mb` is what a forward
pass keeps for the backward pass, weights included; it stays the same where memory is linear in T. Mixers that only run
in evaluation mode are timed forward only, and so is softmax attention beside them. ode counts one function evaluation
as a whole layer (`per_evaluation`).
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import describe, paired, saved_bytes
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.mixers.fasa import FasaAttention
from frankenstein.model.positions import Rotary
from frankenstein.runtime import prepare_torch

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
LINEAR = (
    "retnet", "mamba", "gla_attn", "deltanet_attn", "gated_deltanet_attn", "hgrn2_attn", "kda_attn", "griffin",
    "longformer_attn", "bigbird_attn", "sparsek_attn", "titan_attn",
)  # fmt: skip
EVALUATIONS = {"rk4": 4, "euler": 1}


def build(name: str, width: int, heads: int, device: torch.device) -> Mixer:
    """The layer with its default options, weights drawn as the encoder draws them."""
    torch.manual_seed(0)
    context = MixerContext(width, heads, heads, 0.0, False, 512, 0, Rotary())
    mixer = MIXERS[name](context, MIXERS[name].Options()).to(device)
    for module in mixer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.02)
    mixer.initialize()
    if isinstance(mixer, FasaAttention):
        mixer.calibrated.fill_(True)  # which frequencies it looks at does not change its speed
    return mixer.train(mixer.trainable)


def in_precision(device: torch.device, precision: str) -> torch.autocast:
    """Context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def work(mixer: Mixer, x: Tensor, trainable: bool, precision: str) -> Any:
    """One pass: forward and backward, or forward only."""
    autocast = in_precision(x.device, precision)

    def train() -> None:
        with autocast:
            y = mixer(x, None)
        y.sum().backward()
        mixer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate() -> None:
        with autocast:
            mixer(x, None)

    return train if trainable else evaluate


def measure(name: str, length: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One mixer at one length, in turn with softmax attention."""
    x = torch.randn(max(1, args.tokens // length), length, args.width, device=device)
    mixer, reference = (build(n, args.width, args.heads, device) for n in (name, "standard_attn"))
    reference.train(mixer.trainable)
    mine, theirs = (work(m, x, mixer.trainable, args.precision) for m in (mixer, reference))
    taken, beside = paired(mine, theirs, device, args.runs)
    count = x.shape[0] * length
    with in_precision(device, args.precision):
        saved = saved_bytes(lambda: mixer(x, None)) if mixer.trainable else None
    return {
        "mixer": name,
        "length": length,
        "tokens_per_s": round(count / taken, 1),
        "standard_attn_tokens_per_s": round(count / beside, 1),
        "ratio": round(beside / taken, 3),
        "saved_mb": None if saved is None else round(saved / 2**20, 1),
        "forward_only": not mixer.trainable,
    }


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per mixer: fitted exponent of time over length, ratio to softmax attention, first length where it is ahead."""
    result = []
    for name in dict.fromkeys(row["mixer"] for row in rows):
        own = [row for row in rows if row["mixer"] == name]
        lengths = np.log([row["length"] for row in own])
        row_seconds = np.log([row["length"] / row["tokens_per_s"] for row in own])
        slope = float(np.polyfit(lengths, row_seconds, 1)[0]) if len(own) > 1 else math.nan
        ahead = [row["length"] for row in own if row["ratio"] >= 1]
        entry = {
            "mixer": name,
            "linear_in_its_paper": name in LINEAR,
            "exponent": round(slope, 3),
            "ratio_at": {str(row["length"]): row["ratio"] for row in own},
            "ahead_from": min(ahead) if ahead else None,
        }
        if name == "ode":
            evaluations = EVALUATIONS["rk4"] * 2
            entry["per_evaluation"] = {str(row["length"]): round(row["ratio"] * evaluations, 3) for row in own}
        result.append(entry)
    return result


def main() -> None:
    """Measure, print a table, store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=None, help="names; default: all that are registered")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="row lengths T, in tokens")
    parser.add_argument("--tokens", type=int, default=None, help="tokens of a pass; default: the longest length")
    parser.add_argument("--width", type=int, default=256, help="hidden width D")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each, after a warm-up")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="bfloat16 autocasts")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    args = parser.parse_args()
    prepare_torch(args.threads)
    device, args.tokens = torch.device(args.device), args.tokens or max(args.lengths)
    names = args.mixers or [name for name in MIXERS if name != "retnet_attn"]
    rows = []
    print(f"{'mixer':26}{'T':>6}{'tokens/s':>12}{'softmax':>12}{'ratio':>8}{'saved MB':>10}")
    for name in names:
        for length in args.lengths:
            row = measure(name, length, args, device)
            rows.append(row)
            print(
                f"{name:26}{length:6}{row['tokens_per_s']:12.0f}{row['standard_attn_tokens_per_s']:12.0f}"
                f"{row['ratio']:8.2f}{row['saved_mb'] if row['saved_mb'] is not None else '-':>10}",
                flush=True,
            )
        if args.out is not None:  # after every mixer: a run that is cut short keeps what it has measured
            store(rows, args)
    for entry in summarize(rows):
        print(f"{entry['mixer']:26} exponent {entry['exponent']:.2f}, ahead of softmax from {entry['ahead_from']}")


def store(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write the figures and what they were measured on."""
    settings = {name: getattr(args, name) for name in ("precision", "width", "heads", "runs", "tokens")}
    record = {"machine": describe(), **settings, "summary": summarize(rows), "rows": rows}
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
