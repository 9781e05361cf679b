"""The step log: one CSV row an optimizer step, continued without duplicates by a resumed run.

Times, throughput and memory stand only here, never in a tracked report.
Source: TORMENTED-BERT-Frankenstein, section 8.4.2 (table 5).
"""

import csv
import io
import resource
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frankenstein.artifact import write_text
from frankenstein.errors import FrankensteinError

COLUMNS = (
    "timestamp", "epoch", "step", "global_step", "loss", "accuracy", "learning_rate", "grad_norm", "scaler_scale",
    "gpu_memory_gb", "gpu_cached_gb", "tokens_per_s", "masked_tokens", "peak_memory_gb",
)  # fmt: skip
GRADIENT_COLUMNS = ("grad_norm_before_clip", "grad_abs_mean", "grad_abs_max", "grad_zero_share")
_GB = 1e9


class StepLog:
    """A CSV file with a fixed header; every row is on disk when `write` returns.

    Args:
        path: the file; None keeps no log.
        columns: the header.
        done: finished steps of the run; later rows in the file are dropped, and all rows when it is 0.
        rotate: a file of other columns is moved to <name>.1.csv (or the next free number); False raises.
    Raises:
        FrankensteinError: when the file has other columns and may not be moved.
    """

    def __init__(self, path: Path | None, columns: Sequence[str], *, done: int, rotate: bool) -> None:
        self.path, self.columns = path, list(columns)
        if path is None:
            return
        kept = self._rows_to_keep(path, done, rotate) if path.exists() else []
        write_text(path, "".join(_line(row) for row in [self.columns, *kept]))

    def _rows_to_keep(self, path: Path, done: int, rotate: bool) -> list[list[str]]:
        with path.open(encoding="utf-8", newline="") as stream:
            header, *rows = [*csv.reader(stream)] or [[]]
        if header and header != self.columns:
            if not rotate:
                raise FrankensteinError(
                    f"{path}: has the columns {', '.join(header)}; expected {', '.join(self.columns)}. "
                    "Move the file away, or set csv_rotate_on_schema_change: true"
                )
            path.rename(_free_name(path))
            return []
        at = self.columns.index("global_step")
        whole = [row for row in rows if len(row) == len(self.columns) and row[at].isdigit()]
        return [row for row in whole if int(row[at]) <= done]

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; a column without a value stays empty, numbers have 7 digits."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8", newline="") as stream:
                stream.write(_line([_text(row.get(name)) for name in self.columns]))


def _line(values: list[str]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerow(values)
    return stream.getvalue()


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.7g}" if isinstance(value, float) else str(value)


def _free_name(path: Path) -> Path:
    number = 1
    while (moved := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return moved


def now() -> str:
    """The time, ISO 8601, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def memory_columns(device: torch.device) -> dict[str, float]:
    """Allocated and cached GPU memory and the peak (of the GPU, or of the process on a CPU), in 10^9 bytes."""
    if device.type == "cuda":
        return {
            "gpu_memory_gb": torch.cuda.memory_allocated(device) / _GB,
            "gpu_cached_gb": torch.cuda.memory_reserved(device) / _GB,
            "peak_memory_gb": torch.cuda.max_memory_allocated(device) / _GB,
        }
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"gpu_memory_gb": 0.0, "gpu_cached_gb": 0.0, "peak_memory_gb": peak / _GB}


def gradient_columns(gradients: list[Tensor]) -> dict[str, Tensor]:
    """Mean and largest absolute value and share of zeros over all gradient entries, as 0-dim tensors."""
    count = sum(g.numel() for g in gradients)
    return {
        "grad_abs_mean": torch.stack([g.abs().sum() for g in gradients]).sum() / count,
        "grad_abs_max": torch.stack([g.abs().max() for g in gradients]).max(),
        "grad_zero_share": torch.stack([(g == 0).sum() for g in gradients]).sum() / count,
    }
