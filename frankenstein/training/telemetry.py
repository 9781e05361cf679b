"""What the step log says about a run besides its losses: memory, throughput, gradients, the GPU.

Times, throughput and memory stand only there, never in a tracked report.
Source: TORMENTED-BERT-Frankenstein, section 8.4.2 (table 5).
"""

import resource
import sys
from typing import Any

import torch
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.training.flops import measured_peak, passed_entries
from frankenstein.training.gpu_metrics import COLUMNS as GPU_COLUMNS
from frankenstein.training.gpu_metrics import GpuMetrics
from frankenstein.training.precision import Precision
from frankenstein.training.settings import LoopSettings

COLUMNS = (
    "timestamp", "epoch", "step", "global_step", "loss", "accuracy", "learning_rate", "grad_norm", "scaler_scale",
    "gpu_memory_gb", "gpu_cached_gb", "tokens_per_s", "masked_tokens", "mfu", "peak_memory_gb",
)  # fmt: skip
GRADIENT_COLUMNS = ("grad_norm_before_clip", "grad_abs_mean", "grad_abs_max", "grad_zero_share")
_GB = 1e9


class Telemetry:
    """The columns that the settings ask for, and their values at the steps where they are due.

    Args:
        devices: how many train together; MFU is a share of the rate of all, memory that of this process.
    Raises:
        FrankensteinError: where the settings ask for what the model or the machine does not have.
    """

    def __init__(self, model: nn.Module, settings: LoopSettings, precision: Precision, *, devices: int = 1) -> None:
        self.settings, self.precision, self.devices = settings, precision, devices
        self._blocks = _blocks(model) if settings.enable_block_grad_norms else []
        self._gpu = GpuMetrics(settings.nvml_device_index) if settings.gpu_metrics_backend == "nvml" else None
        self._passed = passed_entries(model)

    @property
    def columns(self) -> tuple[str, ...]:
        """The header of the step log."""
        gradients = GRADIENT_COLUMNS if self.settings.log_gradient_stats else ()
        gpu = GPU_COLUMNS if self._gpu is not None else ()
        return COLUMNS + gradients + tuple(_block_column(i) for i in range(len(self._blocks))) + gpu

    def gradients(self, step: int, gradients: list[Tensor]) -> dict[str, Tensor]:
        """Statistics of the clipped gradients of step `step` (from 1), left on the device."""
        values: dict[str, Tensor] = {}
        if self.settings.log_gradient_stats and step % self.settings.gradient_log_interval == 0:
            values |= gradient_columns(gradients)
        if step % self.settings.telemetry_log_interval == 0:
            values |= {_block_column(i): _norm(block) for i, block in enumerate(self._blocks)}
        return values

    def heavy(self, step: int, tokens_per_s: float, terms_per_s: float) -> dict[str, Any]:
        """Memory, MFU and the GPU, at the steps where heavy telemetry is due."""
        if step % self.settings.telemetry_log_interval:
            return {}
        values: dict[str, Any] = dict(memory_columns(self.precision.device))
        if self._passed is not None:
            peak = measured_peak(self.precision.device, self.precision.matmul_dtype)
            values["mfu"] = self._passed.training_flops(tokens_per_s, terms_per_s) / (self.devices * peak)
        return values | (self._gpu.read() if self._gpu is not None else {})


def _blocks(model: nn.Module) -> list[nn.Module]:
    blocks = dict(model.named_children()).get("blocks")
    if not isinstance(blocks, nn.ModuleList):
        raise FrankensteinError(
            f"training.enable_block_grad_norms: {type(model).__name__} has no list of blocks; expected false"
        )
    return list(blocks)


def _block_column(index: int) -> str:
    return f"grad_norm_block_{index}"


def _norm(block: nn.Module) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in block.parameters() if p.grad is not None])


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
