"""MFU, block gradient norms, NVML; and that watching a run makes nobody wait for the device."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.quantization.convert import convert_to_bitlinear
from frankenstein.training import telemetry
from frankenstein.training.flops import Passed, measured_peak, passed_entries
from frankenstein.training.readings import Readings
from tests.training.tiny_language import pretrain_tiny, write_language
from tests.training.training_standin import Regression, build_net, trainer

D, F, V = 16, 24, 30
PLAIN = {"vocab_size": V, "hidden_size": D, "num_layers": 2, "num_heads": 2, "ffn_hidden_size": F}
ATTENTION, FEED_FORWARD = 4 * D * D, 2 * D * F


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def passed(**options: Any) -> Passed:
    found = passed_entries(
        Encoder(ModelOptions(layer_pattern=("standard_attn",), **{**PLAIN, **options}), max_length=8)
    )
    assert found is not None
    return found


def test_the_entries_a_token_passes_by_hand() -> None:
    assert passed() == (2 * ATTENTION + FEED_FORWARD, FEED_FORWARD + V * D)
    assert passed(num_loops=3).token == 6 * ATTENTION + 5 * FEED_FORWARD
    moe = passed(use_moe=True, num_experts=4, top_k_experts=2)
    assert moe.token == 2 * (ATTENTION + 4 * D + 2 * FEED_FORWARD)
    assert moe.prediction == V * D
    factorized = passed(use_factorized_embedding=True, factorized_embedding_dim=4)
    assert factorized == (passed().token + 4 * D, FEED_FORWARD + V * 4 + 4 * D)
    assert passed(tie_embeddings=False).prediction == FEED_FORWARD + V * D


def test_ternary_layers_pass_the_same_entries_and_an_unknown_model_has_no_estimate() -> None:
    model = Encoder(ModelOptions(layer_pattern=("standard_attn",), **PLAIN), max_length=8)
    before = passed_entries(model)
    assert passed_entries(convert_to_bitlinear(model)) == before
    assert passed_entries(nn.Linear(3, 3)) is None


def test_flops_count_six_for_an_entry_and_the_head_only_where_it_predicts() -> None:
    assert Passed(token=10, prediction=100).training_flops(tokens=7, predictions=2) == 6 * (70 + 200)


def test_the_measured_peak_is_a_rate_and_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    rate = measured_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14 and measured_peak(torch.device("cpu"), torch.float32) == rate
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    write_language(folder)
    return folder


@pytest.fixture(autouse=True)
def torch_settings() -> Any:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def test_mfu_and_block_norms_stand_in_the_log_at_their_interval(
    language: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "measured_peak", lambda device, dtype: 1e9)
    quiet, loud = tmp_path / "quiet", tmp_path / "loud"
    pretrain_tiny(language, quiet)
    pretrain_tiny(language, loud, telemetry_log_interval=4, enable_block_grad_norms=True)
    found = rows(loud / "log.csv")
    blocks = [name for name in found[0] if name.startswith("grad_norm_block_")]
    assert blocks == ["grad_norm_block_0", "grad_norm_block_1"]
    due = [row for row in found if int(row["global_step"]) % 4 == 0]
    assert len(due) == 3 and all(bool(row["mfu"]) == bool(row[blocks[0]]) == (row in due) for row in found)
    for row in due:
        norms = [float(row[name]) for name in blocks]
        assert all(norm > 0 for norm in norms)
        assert sum(norm**2 for norm in norms) < float(row["grad_norm"]) ** 2  # embeddings and norms have their part
        entries = passed_entries(Encoder(ModelOptions(**TINY), max_length=8))
        assert entries is not None
        flops = entries.training_flops(1.0, float(row["masked_tokens"]) / 32) * float(row["tokens_per_s"])
        assert float(row["mfu"]) == pytest.approx(flops / 1e9, rel=0.02)  # one row is padded
    assert (quiet / "encoder/model.safetensors").read_bytes() == (loud / "encoder/model.safetensors").read_bytes()


TINY = {
    "vocab_size": 20, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "retention_heads": 2, "ffn_hidden_size": 24
}  # fmt: skip


def test_block_norms_by_hand(tmp_path: Path) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks, self.last = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.tanh(block(x))
            return self.last(x)

    net, log = Stack(), tmp_path / "log.csv"
    settings = {"enable_block_grad_norms": True, "telemetry_log_interval": 1, "steps": 1, "grad_clip_max_norm": 0.5}
    trainer(tmp_path, log=log, net=net, **settings).run()
    again, data = Stack(), Regression()
    data.loss(again, data.batch(0, 0))[0].backward()
    nn.utils.clip_grad_norm_(again.parameters(), 0.5)
    [row] = rows(log)
    for index, block in enumerate(again.blocks):
        norm = torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None]).norm()
        assert float(row[f"grad_norm_block_{index}"]) == pytest.approx(norm.item(), rel=1e-5)


def test_a_model_without_blocks_has_no_block_norms(tmp_path: Path) -> None:
    with pytest.raises(FrankensteinError, match="enable_block_grad_norms: Net has no list of blocks; expected false"):
        trainer(tmp_path, enable_block_grad_norms=True)


class NVMLError(Exception):
    pass


def fake_nvml(**changes: Any) -> Any:
    def handle(index: int) -> str:
        if index >= 2:
            raise NVMLError("Invalid Argument")
        return f"gpu{index}"

    functions = {
        "NVMLError": NVMLError,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=87, memory=3),
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=2_500_000_000),
        "nvmlDeviceGetTemperature": lambda gpu, sensor: {("gpu1", 0): 61}[gpu, sensor],
        "nvmlDeviceGetPowerUsage": lambda gpu: 215_500,
    }
    return SimpleNamespace(**{**functions, **changes})


NVML = {"gpu_metrics_backend": "nvml", "nvml_device_index": 1, "telemetry_log_interval": 2, "steps": 2}
SENSORS = ("gpu_utilization_percent", "gpu_memory_used_gb", "gpu_temperature_c", "gpu_power_w")


def test_nvml_values_stand_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    trainer(tmp_path, log=tmp_path / "log.csv", **NVML).run()
    first, second = rows(tmp_path / "log.csv")
    assert [first[name] for name in SENSORS] == [""] * 4
    assert [second[name] for name in SENSORS] == ["87", "2.5", "61", "215.5"]


def test_a_sensor_that_a_gpu_lacks_stays_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(gpu: str) -> int:
        raise NVMLError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetPowerUsage=lacking))
    trainer(tmp_path, log=tmp_path / "log.csv", **NVML).run()
    assert [rows(tmp_path / "log.csv")[1][name] for name in SENSORS] == ["87", "2.5", "61", ""]


def test_nvml_is_refused_where_package_driver_or_gpu_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver() -> None:
        raise NVMLError("NVML Shared Library Not Found")

    cases: list[tuple[Any, dict[str, Any], str]] = [
        (None, {}, "gpu_metrics_backend: nvml needs the package nvidia-ml-py"),
        (
            fake_nvml(nvmlInit=no_driver),
            {},
            r"no working NVIDIA driver \(NVML Shared Library Not Found\); expected none",
        ),
        (fake_nvml(), {"nvml_device_index": 2}, r"nvml_device_index: found 2; this machine has 2 GPU\(s\)"),
    ]
    for module, changes, message in cases:
        monkeypatch.setitem(sys.modules, "pynvml", module)
        with pytest.raises(FrankensteinError, match=message):
            trainer(tmp_path, **{**NVML, **changes})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have an NVIDIA driver")
def test_the_real_library_refuses_without_a_driver(tmp_path: Path) -> None:
    with pytest.raises(FrankensteinError, match="gpu_metrics_backend: found nvml, but this machine has no working"):
        trainer(tmp_path, **NVML)


class Waits(TorchDispatchMode):
    """Counts the values that leave the device as numbers; counts of terms and tokens stand on the CPU anyway."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.int64:
            self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("extra", [{}, {"amp": True, "amp_dtype": "float16"}, {"gradient_accumulation_steps": 2}])
def test_nothing_is_read_from_the_device_between_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    """Of 20 steps only 10 and 20 are read."""
    data = Regression((8, 8))
    run = trainer(
        tmp_path, data, net=build_net(), nan_check_interval=10, checkpoint_every_n_steps=10, log_gradient_stats=True,
        gradient_log_interval=1, telemetry_log_interval=1, **extra,
    )  # fmt: skip
    waits, reads = Waits(), []
    step, to_host = run._step, Readings._to_host

    def watched(*arguments: Any) -> None:
        with waits:
            step(*arguments)

    def reading(self: Readings, values: list[torch.Tensor]) -> list[float]:
        reads.append(run.state.step + 1)
        return to_host(self, values)

    run._step = watched  # type: ignore[method-assign]
    monkeypatch.setattr(Readings, "_to_host", reading)
    run.run()
    assert reads == [10, 20] and waits.seen == 0
    with waits:
        assert bool(torch.ones(()) > 0)
    assert waits.seen == 1  # the mode sees what it is here for
