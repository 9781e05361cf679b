"""The bookkeeping of the optimizer race, and two real runs of it through the training loop."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import optimizer_race as race
from benchmarks.optimizer_race import Entry, best, markdown, missing, plan, read_rows, results, setting
from frankenstein import FrankensteinError
from frankenstein.optimizers.contract import contract
from tests.training.tiny_language import write_language


def row(optimizer: str, factor: float, loss: float | None, seed: int = 0) -> dict[str, Any]:
    """A finished run; without a loss, one that was stopped."""
    entry = Entry(optimizer, factor, seed)
    shared = {**entry._asdict(), "lr": entry.lr, "mark": "m", "setup": {}}
    if loss is None:
        return {**shared, "stopped": "NaN"}
    return {**shared, "valid_loss": loss, "tokens_per_s": 100, "curve": [[1, loss + 1], [2, loss]]}


def test_every_optimizer_runs_at_every_factor_of_its_published_rate_one_seed_after_the_other() -> None:
    entries = plan(["adamw", "muon"], [0.3, 1.0], [0, 1])
    assert len(set(entries)) == len(entries) == 8
    assert [e.seed for e in entries] == [0] * 4 + [1] * 4
    assert [e.lr for e in entries[:4]] == [3e-4, 1e-3, 6e-3, 2e-2]
    assert entries[3].lr == contract("muon").lr


def test_a_torn_last_row_is_raced_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    whole = row("adamw", 1.0, 3.0)
    race.append_row(path, whole)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row("muon", 1.0, 3.0))[:20])
    rows = read_rows(path)
    assert rows == [whole]
    assert missing(plan(["adamw", "muon"], [1.0], [0]), rows) == [Entry("muon", 1.0, 0)]
    race.append_row(path, row("muon", 1.0, 2.0))
    assert len(read_rows(path)) == 2


def test_the_lowest_mean_wins_and_a_stopped_seed_never_does() -> None:
    rows = [row("adamw", 1.0, 3.0), row("adamw", 1.0, 5.0, 1), row("adamw", 3.0, 1.0), row("adamw", 3.0, None, 1)]
    rows += [row("lion", 1.0, 3.5), row("lion", 3.0, 3.7), row("sgd_momentum", 1.0, None)]
    order = best(results(rows))
    assert [(r.optimizer, r.factor) for r in order] == [("lion", 1.0), ("adamw", 1.0), ("sgd_momentum", 1.0)]
    assert order[1].loss == 4.0 and order[1].curve == [(1, 5.0), (2, 4.0)]


def test_the_table_marks_a_best_rate_at_the_end_of_the_sweep() -> None:
    inner = [row("adamw", f, loss) for f, loss in ((0.3, 3.2), (1.0, 3.0), (3.0, 3.1))]
    outer = [row("lion", f, loss) for f, loss in ((0.3, 4.0), (1.0, 3.9), (3.0, 3.8))]
    lines = markdown(results([*inner, *outer, row("prodigy", 1.0, None)])).splitlines()
    assert lines[2].startswith("| adamw | 0.001 | 3.000 | - | 3.200 | 3.000 | 3.100 |")
    assert lines[3].startswith("| lion | 0.0003 * | 3.800 |")
    assert lines[4].startswith("| prodigy | 1 | stopped (1) | - | - | stopped (1) | - |")


def test_settings_are_json_values_of_a_known_optimizer() -> None:
    assert setting("muon-ns_dtype=float32") == ("muon-ns_dtype", "float32")
    assert setting("adamw-betas=[0.9, 0.95]") == ("adamw-betas", [0.9, 0.95])
    for text in ("adamw-wd", "nobody-lr=1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected <optimizer>"):
            setting(text)


def arguments(folder: Path, **changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "rows": folder / "rows.jsonl", "work": folder / "work", "tokens": folder / "tokens", "threads": 1,
        "tokenizer": folder / "tokenizer", "steps": 3, "batch_size": 2, "width": 8, "layers": 1, "heads": 2, "set": [],
        "pattern": ["standard_attn"], "precision": "float32", "optimizers": ["adamw", "galore_adamw"],
        "factors": [1.0], "seeds": [0],
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def test_an_interrupted_race_goes_on_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_language(tmp_path)
    args, real, raced = arguments(tmp_path), race.race, []

    def interrupted(entry: Entry, *rest: Any) -> dict[str, Any]:
        if len(raced) == 1:
            raced.append("stop")
            raise KeyboardInterrupt
        raced.append(entry.optimizer)
        return real(entry, *rest)

    monkeypatch.setattr(race, "race", interrupted)
    with pytest.raises(KeyboardInterrupt):
        race.run(args)
    race.run(args)
    rows = read_rows(args.rows)
    assert raced == ["adamw", "stop", "galore_adamw"]
    assert [(r["optimizer"], r["tokens"]) for r in rows] == [
        ("adamw", rows[0]["tokens"]),
        ("galore_adamw", rows[0]["tokens"]),
    ]
    assert [step for step, _ in rows[0]["curve"]] == [1, 2, 3]
    assert not any(args.work.iterdir())
    race.report(args)
    assert "| adamw |" in capsys.readouterr().out
    assert "galore_adamw" in args.rows.with_suffix(".svg").read_text(encoding="utf-8")


def test_another_setup_is_refused_by_what_differs_and_a_foreign_setting_by_its_key(tmp_path: Path) -> None:
    write_language(tmp_path)
    race.run(arguments(tmp_path, optimizers=["adamw"]))
    with pytest.raises(SystemExit, match="scheduler_total_steps 3, now 4"):
        race.run(arguments(tmp_path, steps=4))
    with pytest.raises(FrankensteinError, match="adamw-rank"):
        race.run(arguments(tmp_path, rows=tmp_path / "others.jsonl", set=[("adamw-rank", 2)]))
