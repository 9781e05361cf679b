"""Race of all optimizers: equal tokens, the same model and batches, a small sweep around each published learning rate.

    dvc repro tokenize                                          the tokens and the tokenizer of the embedded sample
    python -m benchmarks.optimizer_race run --steps 200         one JSON row a run, appended as soon as it has ended
    python -m benchmarks.optimizer_race report                  table and picture of the rows
    python -m benchmarks.optimizer_race run --tokens DIR --tokenizer DIR --width 256 --steps 2000      on real text

Every run is `frankenstein.training.pretrain`, the pipeline's own loop: warm-up, cosine (methods that average keep their
rate), clipping, the stability guard. Arguments other than the learning rate are the published defaults, and --set
changes them. GaLore's rank is a quarter of the width (its paper's choice at 1 billion parameters), since its default
projects nothing.
Interrupted, `run` goes on with what is missing, inside of a run from its checkpoint; other --factors or --seeds add to
the race. Rows of another setup, other tokens or another version of the code are refused. Losses are those of the
validation rows, at masks that never change.
"""

import argparse
import csv
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import matplotlib as mpl

from benchmarks.machine import describe
from frankenstein import OPTIMIZERS, load_params
from frankenstein.optimizers.contract import contract
from frankenstein.text.shards import TokenRows
from frankenstein.training.guard import TrainingStopped
from frankenstein.training.pretrain import fingerprint, pretrain

ROWS = Path("benchmarks/results/optimizer_race.jsonl")
FACTORS = (0.3, 1.0, 3.0)
VALIDATIONS = 20  # points of a curve
REFERENCE = "adamw"
Row = dict[str, Any]


class Entry(NamedTuple):
    """One run of the race."""

    optimizer: str
    factor: float
    seed: int

    @property
    def lr(self) -> float:
        """The published learning rate times the factor."""
        return float(f"{contract(self.optimizer).lr * self.factor:.6g}")


def plan(optimizers: Iterable[str], factors: Iterable[float], seeds: Iterable[int]) -> list[Entry]:
    """All runs; one seed after the other, so that a race that is cut short has compared all of them once."""
    return [Entry(*e) for e in ((o, f, s) for s, o, f in itertools.product(seeds, list(optimizers), list(factors)))]


def read_rows(path: Path) -> list[Row]:
    """The finished runs; what a killed process left of its last row is removed from the file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def append_row(path: Path, row: Row) -> None:
    """Add one run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def missing(entries: list[Entry], rows: list[Row]) -> list[Entry]:
    """The runs that have no row yet."""
    done = {Entry(row["optimizer"], row["factor"], row["seed"]) for row in rows}
    return [entry for entry in entries if entry not in done]


def check_setup(rows: list[Row], setup: Row, mark: str, path: Path) -> None:
    """Refuse to mix races: all rows are of this setup, these tokens and this code."""
    for row in rows:
        if row["mark"] == mark:
            continue
        before = row["setup"]
        other = [f"{key} {before.get(key)!r}, now {setup[key]!r}" for key in setup if before.get(key) != setup[key]]
        difference = "; ".join(other) or "other tokens, another version of torch or of the code"
        raise SystemExit(f"{path} holds a race of another setup: {difference}. Move it away, or give other --rows")


def setup_of(args: argparse.Namespace) -> Row:
    """What all runs of a race share: options by dotted key, and what --set asks for."""
    length = TokenRows.open(args.tokens, "train").max_length
    every = max(1, args.steps // VALIDATIONS)
    settings = {"galore_adamw-rank": max(1, args.width // 4), **dict(args.set)}
    return {
        "model.hidden_size": args.width,
        "model.num_layers": args.layers,
        "model.num_heads": args.heads,
        "model.retention_heads": args.heads,
        "model.ffn_hidden_size": 4 * args.width,
        "model.layer_pattern": args.pattern,
        "training.max_length": length,
        "training.batch_size": args.batch_size,
        "training.scheduler_total_steps": args.steps,
        "training.eval_every_n_steps": every,
        "training.checkpoint_every_n_steps": 10 * every,
        "training.max_epoch_checkpoints": 0,
        "training.use_amp": args.precision == "bfloat16",
        "threads": args.threads,
        "settings": settings,
    }


def params_of(entry: Entry, setup: Row, folder: Path) -> Any:
    """The configuration of one run."""
    settings = {k: v for k, v in setup["settings"].items() if k.partition("-")[0] == entry.optimizer}
    overrides = {key: value for key, value in setup.items() if key != "settings"}
    return load_params(
        None,
        {
            **overrides,
            "seed": entry.seed,
            "training.csv_log_path": str(folder / "steps.csv"),
            "training.optimizer.optimizer_class": entry.optimizer,
            "training.optimizer.parameters": {f"{entry.optimizer}-lr": entry.lr, **settings},
        },
    )


def race(entry: Entry, setup: Row, mark: str, args: argparse.Namespace) -> Row:
    """One run, as a row. A run that the stability guard stopped has `stopped` and no losses."""
    folder = args.work / f"{entry.optimizer}-{entry.factor:g}-{entry.seed}"
    params = params_of(entry, setup, folder)
    row: Row = {"mark": mark, "setup": setup, "machine": describe(), **entry._asdict(), "lr": entry.lr}
    try:
        summary = pretrain(
            seed=entry.seed,
            threads=params.threads,
            model_options=params.model,
            training_options=params.training,
            tokens=args.tokens,
            tokenizer=args.tokenizer,
            out=folder / "encoder",
            resume=folder / "resume",
            metrics=folder / "metrics.json",
            curve=folder / "curve.csv",
        )
    except TrainingStopped as error:
        row |= {"stopped": str(error)}
    else:
        speed = [float(step["tokens_per_s"]) for step in table(folder / "steps.csv") if step["tokens_per_s"]]
        row |= {
            "tokens": summary["tokens"],
            "train_loss": summary["train_loss"],
            "valid_loss": summary["valid_loss"],
            "tokens_per_s": round(median(speed)),
            "curve": [(int(p["step"]), float(p["valid_loss"])) for p in table(folder / "curve.csv") if p["valid_loss"]],
        }
    shutil.rmtree(folder)
    return row


def table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream)


def run(args: argparse.Namespace) -> None:
    """Race what has no row yet."""
    setup = setup_of(args)
    mark = fingerprint(setup, args.tokens, args.tokenizer)
    rows = read_rows(args.rows)
    check_setup(rows, setup, mark, args.rows)
    entries = plan(args.optimizers, args.factors, args.seeds)
    todo = missing(entries, rows)
    print(f"{len(entries) - len(todo)} of {len(entries)} runs are done")
    for number, entry in enumerate(todo, len(entries) - len(todo) + 1):
        row = race(entry, setup, mark, args)
        append_row(args.rows, row)
        outcome = row.get("stopped") or f"validation loss {row['valid_loss']:.4f}, {row['tokens_per_s']} tokens/s"
        print(f"{number:4} {entry.optimizer:20} lr {entry.lr:<8g} seed {entry.seed}: {outcome}", flush=True)


class Result(NamedTuple):
    """One optimizer at one learning rate, over its seeds."""

    optimizer: str
    factor: float
    lr: float
    losses: list[float]  # of the seeds that came through
    stopped: int  # seeds that did not
    tokens_per_s: float
    curve: list[tuple[int, float]]  # mean over the seeds

    @property
    def loss(self) -> float:
        """Mean validation loss; infinite where any seed was stopped."""
        return float("inf") if self.stopped or not self.losses else fmean(self.losses)


def results(rows: list[Row]) -> list[Result]:
    """The rows by optimizer and learning rate."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row["optimizer"], row["factor"]), []).append(row)
    collected = []
    for (optimizer, factor), runs in sorted(found.items()):
        through = [r for r in runs if "stopped" not in r]
        curves = [dict(map(tuple, r["curve"])) for r in through]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        collected.append(
            Result(
                optimizer,
                factor,
                runs[0]["lr"],
                [r["valid_loss"] for r in through],
                len(runs) - len(through),
                median(r["tokens_per_s"] for r in through) if through else 0.0,
                [(step, fmean(curve[step] for curve in curves)) for step in steps],
            )
        )
    return collected


def best(found: list[Result]) -> list[Result]:
    """The learning rate with the lowest loss of every optimizer, best optimizer first."""
    names = dict.fromkeys(result.optimizer for result in found)
    lowest = [min((r for r in found if r.optimizer == name), key=lambda r: (r.loss, r.factor)) for name in names]
    return sorted(lowest, key=lambda r: (r.loss, r.optimizer))


def markdown(found: list[Result]) -> str:
    """The table: every optimizer at its best learning rate, and the losses of the whole sweep."""
    factors = sorted({r.factor for r in found})
    sweep = [f"lr x {factor:g}" for factor in factors]
    head = ["optimizer", "best lr", "validation loss", "range over seeds", *sweep, "tokens/s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for top in best(found):
        own = {r.factor: r for r in found if r.optimizer == top.optimizer}
        edge = len(own) > 1 and top.factor in (min(own), max(own)) and top.loss < float("inf")
        spread = f"{max(top.losses) - min(top.losses):.3f}" if len(top.losses) > 1 else "-"
        cells = [top.optimizer, f"{top.lr:g}{' *' if edge else ''}", _loss(top), spread]
        cells += [_loss(own[f]) if f in own else "-" for f in factors]
        lines.append(f"| {' | '.join([*cells, f'{top.tokens_per_s:.0f}'])} |")
    note = "\\* lowest at an end of the sweep: the best learning rate may lie beyond it."
    return "\n".join([*lines, "", note]) + "\n"


def _loss(result: Result) -> str:
    return f"stopped ({result.stopped})" if result.stopped else f"{result.loss:.3f}"


def draw(found: list[Result], file: Path) -> None:
    """A panel an optimizer, in the order of the table: its learning rates, and AdamW's best in grey."""
    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "optimizer_race", "svg.fonttype": "none"}  # the same rows, the same bytes
    from matplotlib import pyplot as plt

    order = best(found)
    columns = min(7, len(order))
    figure, grid = plt.subplots(
        -(-len(order) // columns), columns, sharex=True, sharey=True, squeeze=False, layout="constrained",
        figsize=(2.1 * columns, 2.1 * -(-len(order) // columns) + 0.6),
    )  # fmt: skip
    reference = next((r for r in order if r.optimizer == REFERENCE), None)
    factors = sorted({r.factor for r in found})
    for axes, top in itertools.zip_longest(grid.flat, order):
        if top is None:
            axes.set_visible(False)
            continue
        if reference is not None:
            axes.plot(*zip(*reference.curve, strict=True), color="#b0b0b0", lw=3, label=f"{REFERENCE}, best")
        for result in (r for r in found if r.optimizer == top.optimizer and r.curve):
            shade = mpl.colormaps["Blues"](0.4 + 0.6 * factors.index(result.factor) / max(1, len(factors) - 1))
            axes.plot(*zip(*result.curve, strict=True), color=shade, lw=1, label=f"lr x {result.factor:g}")
        axes.set_title(f"{top.optimizer} {top.loss:.3f}", size=9)
        axes.tick_params(labelsize=7)
    # A rate that is too high may shoot up for a while; the panels end where the losses began.
    starts = [result.curve[0][1] for result in found if result.curve]
    ends = [result.curve[-1][1] for result in found if result.curve]
    if starts:
        grid[0, 0].set_ylim(min(ends) - 0.1, max(starts) + 0.3)
    handles = {label: line for axes in grid.flat for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=max(1, len(handles)), fontsize=8)
    figure.supxlabel("optimizer steps, equal tokens", size=9)
    figure.supylabel("validation loss (masked tokens)", size=9)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def report(args: argparse.Namespace) -> None:
    """Write table and picture beside the rows, and print the table."""
    rows = read_rows(args.rows)
    if not rows:
        raise SystemExit(f"{args.rows}: no finished run; start with `python -m benchmarks.optimizer_race run`")
    if len({row["mark"] for row in rows}) > 1:
        raise SystemExit(f"{args.rows}: rows of more than one setup or version; race again into another file")
    found = results(rows)
    text = markdown(found)
    args.rows.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(found, args.rows.with_suffix(".svg"))
    print(text, end="")
    absent = sorted(set(OPTIMIZERS) - {row["optimizer"] for row in rows})
    if absent:
        print(f"not raced: {', '.join(absent)}")


def setting(text: str) -> tuple[str, Any]:
    """`<class>-<suffix>=<value>`, the value in JSON or as a plain word."""
    key, equals, value = text.partition("=")
    if not equals or key.partition("-")[0] not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected <optimizer>-<suffix>=<value>")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, help="JSON lines, one a run")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = argparse.ArgumentDefaultsHelpFormatter
    add = commands.add_parser("run", help="race what has no row yet", formatter_class=shown).add_argument
    add("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS), metavar="NAME", help="names")
    add("--factors", nargs="+", type=float, default=list(FACTORS), help="of the published learning rate")
    add("--seeds", nargs="+", type=int, default=[0], help="of weights, order and masks")
    add("--steps", type=int, default=200, help="optimizer steps of each")
    add("--batch-size", type=int, default=16, help="rows in a batch")
    add("--tokens", type=Path, default=Path("data/tokens"), help="artifact of the tokenize stage")
    add("--tokenizer", type=Path, default=Path("data/tokenizer"), help="the one of these tokens")
    add("--width", type=int, default=128, help="hidden width D")
    add("--layers", type=int, default=4, help="layers")
    add("--heads", type=int, default=4, help="attention heads")
    add("--pattern", nargs="+", default=["standard_attn"], help="mixers, one a layer, cycled")
    add("--precision", default="float32", choices=["float32", "bfloat16"], help="bfloat16 autocasts")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--set", nargs="+", type=setting, default=[], metavar="KEY=VALUE", help="as shampoo-precondition_frequency=10")
    add("--work", type=Path, default=Path("data/race"), help="checkpoints of the run that is under way")
    commands.add_parser("report", help="table and picture")
    return parser.parse_args()


def main() -> None:
    """Race or report."""
    args = parse()
    {"run": run, "report": report}[args.command](args)


if __name__ == "__main__":
    main()
