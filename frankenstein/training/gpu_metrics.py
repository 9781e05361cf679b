"""Load, memory, temperature and power of one GPU, from the driver's management library (NVML)."""

from types import ModuleType

from frankenstein.errors import FrankensteinError

COLUMNS = ("gpu_utilization_percent", "gpu_memory_used_gb", "gpu_temperature_c", "gpu_power_w")
_GB, _MILLIWATT = 1e9, 1e-3


class GpuMetrics:
    """Reads one GPU; what other processes do on it is part of the numbers.

    Source: https://docs.nvidia.com/deploy/nvml-api/ through the package nvidia-ml-py.
    Args:
        index: the GPU by the driver's numbering, which CUDA_VISIBLE_DEVICES does not change.
    Raises:
        FrankensteinError: where the package, the driver or this GPU is missing.
    """

    def __init__(self, index: int) -> None:
        self._nvml = _load()
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        except self._nvml.NVMLError:
            count = self._nvml.nvmlDeviceGetCount()
            raise FrankensteinError(
                f"training.nvml_device_index: found {index}; this machine has {count} GPU(s), counted from 0"
            ) from None

    def read(self) -> dict[str, float | None]:
        """The values now; None where the GPU does not tell."""
        nvml, handle = self._nvml, self._handle
        readings = (
            lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / _GB,
            lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            lambda: nvml.nvmlDeviceGetPowerUsage(handle) * _MILLIWATT,
        )
        values: dict[str, float | None] = {}
        for name, reading in zip(COLUMNS, readings, strict=True):
            try:
                values[name] = reading()
            except nvml.NVMLError:  # not every GPU has every sensor
                values[name] = None
        return values


def _load() -> ModuleType:
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:
        raise FrankensteinError(
            "training.gpu_metrics_backend: nvml needs the package nvidia-ml-py, which is not installed; "
            "install it or choose none"
        ) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise FrankensteinError(
            f"training.gpu_metrics_backend: found nvml, but this machine has no working NVIDIA driver ({error}); "
            "expected none"
        ) from None
    return pynvml
