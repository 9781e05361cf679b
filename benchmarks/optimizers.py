"""Time of a step and size of the state of every optimizer, beside torch's AdamW (foreach) in the same run.

    python -m benchmarks.optimizers --peers --out benchmarks/results/optimizers_cpu.json
    python -m benchmarks.optimizers --layers 2 --runs 3 --optimizers lion lamb
    python -m benchmarks.optimizers --device cuda --out benchmarks/results/optimizers_cuda.json

The parameters have BERT-base's shapes (110 million with 12 layers), the gradients are random and stay. An optimizer
and AdamW take turns on the same tensors. `ratio` compares the medians of their times, `cpu_ratio` those of the
process's CPU time, which other load disturbs less (on a GPU: the cost of launching). `first_s` is the first step, which
makes the state and, where a method has one, the first decomposition; `slowest_s` the slowest of the others.
--peers adds implementations of the same methods that are installed: torch's own, schedulefree, timm, prodigyopt.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.machine import describe, seconds
from frankenstein.optimizers import OPTIMIZERS
from frankenstein.optimizers.matrix_method import iteration_dtype

Step = Callable[[], object]

# Settings under which the methods are used in practice, where the defaults are not.
SETTINGS: dict[str, dict[str, Any]] = {"shampoo": {"precondition_frequency": 100}}
HIDDEN_ONLY: dict[str, dict[str, Any]] = {"galore_adamw": {"rank": 128}}  # for the group of hidden matrices
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softsignum, soft": ("softsignum", {"sign_steps": 0, "transition_steps": 1000}),
    "softmuon, soft": ("softmuon", {"sign_steps": 0, "transition_steps": 1000}),
}
ORTHOGONALIZING = ("muon", "turbo_muon", "softmuon")
# Ours -> module, class and arguments of published implementations.
PEERS: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "sgd_momentum": [("torch.optim", "SGD", {"momentum": 0.9, "foreach": True})],
    "adamw": [("torch.optim", "AdamW", {"fused": True}), ("torch.optim", "AdamW", {"foreach": False})],
    "adafactor": [("torch.optim", "Adafactor", {"foreach": True})],
    "radam": [("torch.optim", "RAdam", {"foreach": True, "decoupled_weight_decay": True})],
    "muon": [("torch.optim", "Muon", {"lr": 0.02})],
    "schedulefree_adamw": [("schedulefree", "AdamWScheduleFree", {"foreach": True})],
    "lion": [("timm.optim", "Lion", {"foreach": True})],
    "adan": [("timm.optim", "Adan", {"foreach": True})],
    "adopt": [("timm.optim", "Adopt", {"foreach": True})],
    "lamb": [("timm.optim", "Lamb", {})],
    "mars_adamw": [("timm.optim", "Mars", {})],
    "cautious_adamw": [("timm.optim", "AdamWLegacy", {"caution": True, "foreach": True})],
    "prodigy": [("prodigyopt", "Prodigy", {})],
}


def bert_shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Kind ("embedding", "hidden" or "vector") and shape of the parameters of BERT-base with so many layers."""
    yield from (("embedding", (rows, 768)) for rows in (30522, 512, 2))
    for rows, columns in [(768, 768)] * (4 * layers + 1) + [(3072, 768), (768, 3072)] * layers:
        yield "hidden", (rows, columns)
        yield "vector", (rows,)
    yield from (("vector", (768,)) for _ in range(2 * (2 * layers + 1)))


def parameters(layers: int, device: torch.device) -> dict[str, list[nn.Parameter]]:
    """The parameters by kind, with gradients."""
    torch.manual_seed(0)
    members: dict[str, list[nn.Parameter]] = {}
    for kind, shape in bert_shapes(layers):
        p = nn.Parameter(0.02 * torch.randn(shape, device=device))
        p.grad = 1e-3 * torch.randn(shape, device=device)
        members.setdefault(kind, []).append(p)
    return members


def flatten(members: dict[str, list[nn.Parameter]]) -> list[nn.Parameter]:
    """All of them."""
    return [p for kind in members.values() for p in kind]


def build(name: str, arguments: dict[str, Any], members: dict[str, list[nn.Parameter]]) -> list[Optimizer]:
    """One of the library's optimizers, over groups as an encoder has them."""
    hidden = {"params": members["hidden"], **HIDDEN_ONLY.get(name, {})}
    embedding = {"params": members["embedding"], **({"matrix": False} if name in ORTHOGONALIZING else {})}
    return [OPTIMIZERS[name]([embedding, hidden, {"params": members["vector"]}], **SETTINGS.get(name, {}), **arguments)]


def build_peer(module: str, cls: str, arguments: dict[str, Any], members: dict[str, Any]) -> list[Optimizer] | str:
    """A published implementation, or why it is left out; torch's Muon has fused AdamW beside it."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return "not installed"
    peer = getattr(importlib.import_module(module), cls)
    if (module, cls) != ("torch.optim", "Muon"):
        optimizer = peer(flatten(members), **arguments)
    if module == "schedulefree":
        optimizer.train()  # it refuses to step otherwise
    return [optimizer]
    if iteration_dtype("bfloat16", members["hidden"][0].device) != torch.bfloat16:
        return "iterates in bfloat16, which this CPU emulates: minutes a step"
    others = torch.optim.AdamW(members["embedding"] + members["vector"], fused=True)
    return [peer(members["hidden"], **arguments), others]


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Bytes of the tensors in the state, each storage counted once."""
    found: list[Any] = [[(o.state, o.param_groups) for o in optimizers]]
    own = {p.untyped_storage().data_ptr() for o in optimizers for group in o.param_groups for p in group["params"]}
    storages: dict[int, int] = {}
    while found:
        value = found.pop()
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            found.extend(value.values())
        elif isinstance(value, (list, tuple)):
            found.extend(value)
    return sum(size for address, size in storages.items() if address not in own)


def spent(step: Step, device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    start = time.process_time()
    wall = seconds(step, device)
    return wall, time.process_time() - start


def measure(label: str, optimizers: list[Optimizer], beside: Step, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of the optimizers, in turn with AdamW's, until there are enough or the time is up."""

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    device, end = torch.device(args.device), time.monotonic() + args.limit
    first_s, _ = spent(step, device)
    seconds(beside, device)
    own: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    while len(own) < args.runs and (not own or time.monotonic() < end):
        own.append(spent(step, device))
        theirs.append(spent(beside, device))
    (wall, cpu), (wall_beside, cpu_beside) = (
        [median(column) for column in zip(*side, strict=True)] for side in (own, theirs)
    )
    return {
        "optimizer": label,
        "step_s": round(wall, 5),
        "adamw_foreach_step_s": round(wall_beside, 5),
        "ratio": round(wall / wall_beside, 3),
        "cpu_ratio": round(cpu / cpu_beside, 3),
        "first_s": round(first_s, 5),
        "slowest_s": round(max(wall for wall, _ in own), 5),
        "runs": len(own),
        "state_mb": round(state_bytes(optimizers) / 2**20, 1),
    }


def entries(args: argparse.Namespace, members: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Label and builder of everything to measure."""
    names = args.optimizers or list(OPTIMIZERS)
    for name in names:
        yield name, lambda name=name: build(name, {}, members)
        for label, (of, arguments) in VARIANTS.items():
            if of == name:
                yield label, lambda name=name, arguments=arguments: build(name, arguments, members)
        for module, cls, arguments in PEERS.get(name, []) if args.peers else []:
            shown = ", ".join([f"{module}.{cls}", *(f"{key}={value}" for key, value in arguments.items())])
            yield shown, lambda peer=(module, cls, arguments): build_peer(*peer, members)


def main() -> None:
    """Measure, print a table, store the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=None, help="names; default: all that are registered")
    parser.add_argument("--layers", type=int, default=12, help="layers of BERT-base")
    parser.add_argument("--runs", type=int, default=7, help="counted steps of each, after a first one")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which no further step begins")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peers", action="store_true", help="also published implementations that are installed")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    members = parameters(args.layers, torch.device(args.device))
    beside = torch.optim.AdamW(flatten(members), lr=1e-6, foreach=True)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    print(f"{'optimizer':40}{'step s':>10}{'AdamW s':>10}{'ratio':>8}{'cpu':>7}{'first s':>10}{'state MB':>10}")
    for label, builder in entries(args, members):
        optimizers = builder()
        if isinstance(optimizers, str):
            left_out[label] = optimizers
            continue
        row = measure(label, optimizers, beside.step, args)
        rows.append(row)
        print(
            f"{label:40}{row['step_s']:10.4f}{row['adamw_foreach_step_s']:10.4f}{row['ratio']:8.2f}"
            f"{row['cpu_ratio']:7.2f}{row['first_s']:10.3f}{row['state_mb']:10.1f}",
            flush=True,
        )
        del optimizers
        gc.collect()
    for label, reason in left_out.items():
        print(f"{label:60} left out: {reason}")
    if args.out is not None:
        record = {
            "command": " ".join(["python -m benchmarks.optimizers", *sys.argv[1:]]),
            "machine": describe(),
            "layers": args.layers,
            "parameters": sum(p.numel() for p in flatten(members)),
            "settings": {**SETTINGS, **{name: {"hidden matrices": values} for name, values in HIDDEN_ONLY.items()}},
            "left_out": left_out,
        }
        args.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
