"""Training curves from their CSV files."""

import csv
from dataclasses import dataclass
from pathlib import Path

from frankenstein.errors import FrankensteinError

# What a curve file may hold beside "step"; a "model" column makes one curve a model.
SERIES = ("loss", "valid_loss", "learning_rate", "dev_spearman")


@dataclass(frozen=True)
class Curve:
    """Points (step, value) of each series of one run; `name` is the model, or empty."""

    name: str
    series: dict[str, list[tuple[int, float]]]


def read_curves(path: Path) -> list[Curve]:
    """The curves of a file, one a value of its "model" column; empty cells are left out.

    Raises:
        FrankensteinError: when the file is missing, or has no step column or no number where one belongs.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise FrankensteinError(f"{path}: cannot be read ({error}); expected a training curve") from None
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for number, row in enumerate(rows, start=2):
        series = found.setdefault(row.get("model") or "", {})
        try:
            for name in (name for name in SERIES if row.get(name)):
                series.setdefault(name, []).append((int(row["step"]), float(row[name])))
        except (KeyError, ValueError):
            raise FrankensteinError(f"{path}:{number}: expected a step and numbers; found {dict(row)}") from None
    return [Curve(name, series) for name, series in found.items()]


def smoothed(points: list[tuple[int, float]], width: int = 40) -> list[tuple[int, float]]:
    """Means of consecutive runs of points, at most about `width` of them, each at its last step."""
    size = max(1, len(points) // width)
    blocks = (points[i : i + size] for i in range(0, len(points), size))
    return [(block[-1][0], sum(value for _, value in block) / len(block)) for block in blocks]
