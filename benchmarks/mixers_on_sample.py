"""Train each mixer on the embedded sample through DVC's queue, and draw what came out.

    python -m benchmarks.mixers_on_sample queue --steps 100     one queued experiment a mixer
    dvc exp run --run-all                                       work the queue off
    python -m benchmarks.mixers_on_sample report                table and picture of the finished experiments

Each experiment has one mixer in all layers (`model.layer_pattern=[<mixer>]`) and stops after `pretrain`. The loss comes
from the experiment's metrics, speed and memory from its step log, which stands outside of the queue's temporary folder.
Mixers that cannot be trained (sparge_attn, fasa_attn) are left out.
"""

import argparse
import csv
import json
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

from frankenstein.mixers.base import MIXERS

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "reports" / "logs" / "mixers"
RESULTS = ROOT / "benchmarks" / "results"
PREFIX = "mixer-"


def names() -> list[str]:
    """The mixers that can be trained, without aliases."""
    return [name for name in MIXERS if MIXERS[name].trainable and name != "retnet_attn"]


def queue(steps: int, mixers: list[str]) -> None:
    """Queue one experiment a mixer."""
    LOGS.mkdir(parents=True, exist_ok=True)
    for name in mixers:
        sets = {
            "model.layer_pattern": f"[{name}]",
            "training.scheduler_total_steps": steps,
            "+training.csv_log_path": LOGS / f"{name}.csv",
            "+training.telemetry_log_interval": 5,
        }
        command = ["dvc", "exp", "run", "--queue", "-n", PREFIX + name.replace("_", "-")]
        for key, value in sets.items():
            command += ["-S", f"{key}={value}"]
        subprocess.run([*command, "pretrain"], cwd=ROOT, check=True)


def losses() -> dict[str, float]:
    """Validation loss of every finished experiment, by mixer."""
    shown = subprocess.run(
        ["dvc", "exp", "show", "--json", "--all-commits"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found: dict[str, float] = {}
    wanted = {PREFIX + name.replace("_", "-"): name for name in names()}
    for revision in _walk(json.loads(shown.stdout)):
        mixer = wanted.get(str(revision.get("name")))
        metrics = ((revision.get("data") or {}).get("metrics") or {}).get("reports/metrics/pretrain.json", {})
        values = metrics.get("data") or {}
        if mixer and "valid_loss" in values:
            found.setdefault(mixer, values["valid_loss"])  # the newest commit comes first
    return found


def _walk(node: Any) -> Any:
    """Every mapping inside a JSON tree."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from _walk(value)


def collect() -> list[dict[str, Any]]:
    """A row a mixer: validation loss, median tokens per second, peak memory."""
    loss, rows = losses(), []
    for name in names():
        file = LOGS / f"{name}.csv"
        if name not in loss or not file.is_file():
            continue
        with file.open(encoding="utf-8", newline="") as stream:
            steps = list(csv.DictReader(stream))
        speed = [float(s["tokens_per_s"]) for s in steps if s.get("tokens_per_s")]
        memory = [float(s["peak_memory_gb"]) * 1000 for s in steps if s.get("peak_memory_gb")]
        rows.append(
            {
                "mixer": name,
                "valid_loss": round(loss[name], 4),
                "tokens_per_s": round(median(speed)),
                "peak_memory_mb": round(max(memory)) if memory else None,
                "steps": len(steps),
            }
        )
    return sorted(rows, key=lambda row: row["valid_loss"])


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Loss against speed, a point a mixer."""
    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.scatter([r["tokens_per_s"] for r in rows], [r["valid_loss"] for r in rows], s=24, color="#1f5fa8")
    for row in rows:
        axes.annotate(
            row["mixer"], (row["tokens_per_s"], row["valid_loss"]), (4, 3), textcoords="offset points", size=8
        )
    axes.set_xlabel("tokens per second in training")
    axes.set_ylabel("validation loss (masked tokens)")
    axes.set_title("One mixer in every layer, equal steps, embedded sample")
    figure.savefig(file, metadata={"Date": None})


def report() -> None:
    """Write the table and the picture, and print the table."""
    rows = collect()
    if not rows:
        raise SystemExit("no finished experiment found; run `make mixers-queue` first")
    lines = ["| mixer | validation loss | tokens/s | peak memory, MB | steps |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['mixer']} | {r['valid_loss']:.3f} | {r['tokens_per_s']} | {r['peak_memory_mb'] or '-'} | {r['steps']} |"
        for r in rows
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "mixers_on_sample.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(rows, RESULTS / "mixers_on_sample.svg")
    print("\n".join(lines))
    missing = [name for name in names() if name not in {r["mixer"] for r in rows}]
    if missing:
        print(f"not finished: {', '.join(missing)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("queue", help="queue one experiment a mixer")
    add.add_argument("--steps", type=int, default=100, help="optimizer steps of each")
    add.add_argument("--mixers", nargs="+", default=None, help="names; default: all that can be trained")
    commands.add_parser("report", help="table and picture of the finished experiments")
    args = parser.parse_args()
    if args.command == "queue":
        queue(args.steps, args.mixers or names())
    else:
        report()


if __name__ == "__main__":
    main()
