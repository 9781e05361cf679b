"""Several processes train one model: the losses and weights of one process, whoever goes on, and clear ends."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from frankenstein.errors import FrankensteinError
from frankenstein.optimizers.contract import CONTRACTS
from frankenstein.quantization.options import QuantizeOptions
from frankenstein.sentence.finetune import finetune, finetune_sbert
from frankenstein.sentence.options import SbertOptions
from frankenstein.sentence.pairs import PairData
from frankenstein.training.mlm import MlmBatch
from frankenstein.training.objective import Objective
from frankenstein.training.options import OptimizerOptions, TrainingOptions
from frankenstein.training.processes import Processes, processes
from frankenstein.training.replay import replay
from frankenstein.training.sharded import check_sharding
from frankenstein.training.ternary import quantize_encoder
from tests.training.tiny_language import LENGTH, SHAPE, write_language
from tests.training.training_standin import trainer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
# Shares of 2 and 3 rows.
TRAINING = {
    "scheduler_total_steps": STEPS, "batch_size": 5, "gradient_accumulation_steps": 2, "log_gradient_stats": True,
    "gradient_log_interval": 1, "enable_block_grad_norms": True, "telemetry_log_interval": 1,
}  # fmt: skip
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
MODES = pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
NUMBERS = ("loss", "accuracy", "valid_loss", "valid_accuracy", "grad_norm", "learning_rate")


@dataclass
class Result:
    """Exit codes and outputs of the processes; what the first one wrote, and what each held in the end."""

    out: Path
    folder: Path
    codes: list[int]
    texts: list[str]

    def held(self, rank: int = 0) -> dict[str, Any]:
        parts: dict[str, Any] = torch.load(self.folder / f"{rank}.pt", weights_only=True)
        return parts

    def log(self) -> list[dict[str, str]]:
        with (self.out / "log.csv").open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))


class Machine:
    """The program that runs jobs, and a small language."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.language = folder, folder / "language"
        write_language(self.language)
        command = [sys.executable, "-W", "error", str(Path(__file__).with_name("distributed_process.py"))]
        pipe = subprocess.PIPE
        self.program = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True)

    def run(self, name: str, size: int, *, model: dict[str, Any] | None = None, **job: Any) -> Result:
        out, results = self.folder / name, self.folder / f"{name}-{size}-results"
        for folder in (out, results):
            folder.mkdir(exist_ok=True)
        training = {**TRAINING, **job.pop("training", {})}
        paths = {"language": str(self.language), "out": str(out), "results": str(results)}
        assert self.program.stdin is not None and self.program.stdout is not None
        line = json.dumps({"size": size, "model": model or {}, **paths, "training": training, **job})
        self.program.stdin.write(line + "\n")
        self.program.stdin.flush()
        codes, texts = zip(*json.loads(self.program.stdout.readline()), strict=True)
        return Result(out, results, list(codes), list(texts))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("distributed"))
    yield machine
    assert machine.program.stdin is not None and machine.program.stdout is not None
    machine.program.stdin.close()
    machine.program.wait()
    machine.program.stdout.close()


@pytest.fixture(scope="module")
def alone(machine: Machine) -> Result:
    result = machine.run("alone", 1)
    assert result.codes == [0], result.texts
    return result


def assert_same_to_rounding(got: Result, want: Result) -> None:
    """Losses, norms and final weights; the step log has every step once."""
    for mine, theirs in zip(got.held()["history"], want.held()["history"], strict=True):
        assert mine.keys() == theirs.keys()
        for name in NUMBERS:
            if mine.get(name) is not None or theirs.get(name) is not None:
                assert mine[name] == pytest.approx(theirs[name], abs=1e-6, rel=0), (mine["step"], name)
    for name, tensor in got.held()["weights"].items():
        torch.testing.assert_close(tensor, want.held()["weights"][name], atol=1e-6, rtol=0)
    ours, rows = got.log(), want.log()
    assert [row["global_step"] for row in ours] == [str(step) for step in range(1, STEPS + 1)]
    logged = ("tokens", "masked_tokens", "grad_norm_before_clip", "grad_abs_max", "grad_norm_block_1")
    for mine, theirs in zip(ours, rows, strict=True):
        for name in (name for name in logged if name in mine):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-4), name


def assert_equal_weights(result: Result) -> None:
    """Every process holds the same bits, and they are those on disk."""
    assert set(result.codes) == {0}, result.texts
    weights = [result.held(rank)["weights"] for rank in range(len(result.codes))]
    for other in weights[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in weights[0].items())
    (file,) = (result.out / "encoder").glob("*.safetensors")
    saved = load_file(file)
    assert saved and all(torch.equal(tensor, weights[0][name]) for name, tensor in saved.items())


@pytest.mark.parametrize("size", [2, 3])
@MODES
def test_several_processes_have_the_losses_and_weights_of_one(
    machine: Machine, alone: Result, mode: str, size: int
) -> None:
    together = machine.run(f"{mode}{size}", size, training={"distributed": mode})
    assert_equal_weights(together)
    assert_same_to_rounding(together, alone)
    summary, single = (json.loads((run.out / "metrics.json").read_text()) for run in (together, alone))
    assert summary.pop("parameters") == single.pop("parameters")
    assert summary == pytest.approx(single, abs=1e-4)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@MODES
def test_a_run_goes_on_with_another_number_of_processes(
    machine: Machine, alone: Result, mode: str, before: int, after: int
) -> None:
    name, training = f"{mode}-from{before}to{after}", {"distributed": mode}
    died = machine.run(name, before, die_at=7, training=training)
    assert died.codes[-1] == -signal.SIGKILL
    if before == 2:
        assert died.codes[0] == 2
        assert "another process of this training has ended" in died.texts[0]
        assert "run again to go on from the newest checkpoint" in died.texts[0]
    went_on = machine.run(name, after, training=training)
    assert_equal_weights(went_on)
    assert len(list((went_on.out / "resume").glob("*/*"))) == 0
    assert_same_to_rounding(went_on, alone)


def test_processes_draw_their_own_dropout_and_still_hold_the_same_weights(machine: Machine) -> None:
    result = machine.run("dropout", 2, model={"dropout": 0.3}, training={"scheduler_total_steps": 4})
    assert_equal_weights(result)
    assert not torch.equal(result.held(0)["generator"], result.held(1)["generator"])


@pytest.mark.parametrize("method", ["sophia", "muon", "shampoo", "schedulefree_adamw"])
def test_methods_with_state_of_their_own_hold_the_same_weights_everywhere(machine: Machine, method: str) -> None:
    assert_equal_weights(machine.run(method, 2, optimizer=method, training={"scheduler_total_steps": 5}))


def test_float16_scales_alike_in_all_processes(machine: Machine) -> None:
    float16 = {"use_amp": True, "amp_dtype": "float16", "scheduler_total_steps": 4}
    one, two = (machine.run(f"half{size}", size, training=float16) for size in (1, 2))
    assert_equal_weights(two)
    # The second step overflows: in shares of a batch, single gradients are larger than in the whole.
    assert [row["scaler_scale"] for row in one.log()] == ["65536"] * 4
    assert [row["scaler_scale"] for row in two.log()] == ["65536", "65536", "32768", "32768"]
    for mine, theirs in zip(two.held()["history"][:2], one.held()["history"][:2], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@MODES
def test_a_step_that_goes_wrong_in_one_process_is_skipped_by_all(machine: Machine, mode: str) -> None:
    result = machine.run(f"{mode}-poisoned", 2, poison_at=5, training={"distributed": mode})
    assert_equal_weights(result)
    assert "step 6 is unstable" in result.texts[0] and "step 6" not in result.texts[1]
    assert [path.name for path in (result.out / "resume").glob("*/*")] == ["emergency-00000005"]
    assert result.held()["history"][5]["loss"] is None


@pytest.mark.parametrize("method", ["sophia", "schedulefree_adamw"])
def test_parts_of_a_method_s_state_are_those_of_the_whole(machine: Machine, method: str) -> None:
    training = {"distributed": "fsdp2", "scheduler_total_steps": 5}
    one, two = (machine.run(f"parts-{method}{n}", n, optimizer=method, training=training) for n in (1, 2))
    assert_equal_weights(two)
    for name, tensor in two.held()["weights"].items():
        torch.testing.assert_close(tensor, one.held()["weights"][name], atol=1e-6, rtol=0)


@MODES
def test_weights_that_layers_share_loops_and_experts_are_trained_together(machine: Machine, mode: str) -> None:
    model = {"layer_pattern": ["hgrn2_attn"], "num_loops": 2, "use_moe": True, "gradient_checkpointing": True}
    result = machine.run(f"{mode}-shared", 2, model=model, training={"scheduler_total_steps": 3, "distributed": mode})
    assert_equal_weights(result)


def test_all_processes_stop_when_the_retries_are_used_up(machine: Machine) -> None:
    result = machine.run("stopped", 2, poison_at=5, training={"max_nan_retries": 0})
    assert result.codes == [2, 2]
    assert all("training stopped at step 6" in text for text in result.texts)


def test_a_budget_of_seconds_ends_all_processes_at_the_same_step(machine: Machine) -> None:
    result = machine.run("seconds", 2, training={"max_seconds": 1e-3})
    assert_equal_weights(result)
    assert [len(result.held(rank)["history"]) for rank in (0, 1)] == [1, 1]


def test_more_processes_than_rows_are_refused(machine: Machine) -> None:
    result = machine.run("few", 2, training={"batch_size": 1})
    assert result.codes == [2, 2]
    assert "training.batch_size is 1, shared by 2 processes; expected at least one row for each" in result.texts[0]


def test_a_method_that_needs_whole_matrices_is_refused_in_parts(machine: Machine) -> None:
    result = machine.run("muon-parts", 2, optimizer="muon", training={"distributed": "fsdp2"})
    assert result.codes == [2, 2]
    assert "optimizer.optimizer_class is muon, which needs whole tensors; expected ddp, or one of" in result.texts[0]


@pytest.mark.parametrize("name", sorted(name for name, rules in CONTRACTS.items() if not rules.elementwise))
def test_every_other_method_is_refused_in_parts(name: str) -> None:
    with pytest.raises(FrankensteinError, match=f"optimizer_class is {name}, which needs whole tensors"):
        check_sharding(TrainingOptions(distributed="fsdp2", optimizer=OptimizerOptions(name)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_galore": True}, "use_galore is true"),
        ({"use_amp": True, "amp_dtype": "float16"}, "amp_dtype is float16"),
        ({"compile": True}, "compile is true"),
    ],
)
def test_options_that_need_whole_tensors_are_refused_in_parts(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FrankensteinError, match=message):
        check_sharding(TrainingOptions(distributed="fsdp2", **values))


def test_the_command_line_prepares_the_text_once_and_trains_together(machine: Machine) -> None:
    tiny = {
        **{f"model.{name}": value for name, value in SHAPE.items()}, "model.vocab_size": 400, "training.max_length": 16,
        "model.layer_pattern": "[standard_attn]", "training.batch_size": 4, "training.scheduler_total_steps": 2,
        "training.max_samples": 60, "data.source": "sample",
    }  # fmt: skip
    sets = [word for key, value in tiny.items() for word in ("--set", f"{key}={value}")]
    out = machine.folder / "cli"
    result = machine.run("cli", 2, command=["train", "--out", str(out), *sets])
    assert_equal_weights(result)
    assert result.texts[0].splitlines()[-1] == str(out / "encoder")
    assert result.texts[1] == ""


def test_the_first_process_s_mistake_ends_all_before_any_training(machine: Machine) -> None:
    sets = ["--set", "data.source=parquet", "--set", f"data.path={machine.folder / 'none'}"]
    result = machine.run("wrong", 2, command=["train", "--out", str(machine.folder / "wrong"), *sets])
    assert result.codes == [2, 2]
    assert all(str(machine.folder / "none") in text for text in result.texts)


def test_torchrun_starts_the_stage(tmp_path: Path) -> None:
    write_language(tmp_path)
    training = {"max_length": LENGTH, "batch_size": 4, "scheduler_total_steps": 2, "csv_log_path": "log.csv"}
    values = {"seed": 0, "threads": 1, "model": {"vocab_size": 300, **SHAPE}, "training": training}
    (tmp_path / "params.yaml").write_text(json.dumps(values))
    names = {"encoder": "encoder", "metrics": "metrics.json", "curve": "curve.csv", "resume": "resume"}
    paths = [f"--{name}={path}" for name, path in {"tokens": "tokens", "tokenizer": "tokenizer", **names}.items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, "-m", "stages.pretrain", *paths]
    result = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("step 2/2") == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 2
    assert (tmp_path / "encoder" / "manifest.json").is_file() and not (tmp_path / "resume").exists()


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of the first of two processes."""
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


def _finish() -> None:
    none, training = Path("none"), TrainingOptions()
    paths = {name: none for name in ("encoder", "tokens", "out", "resume", "metrics", "curve")}
    quantize_encoder(seed=0, threads=1, options=QuantizeOptions(), training_options=training, **paths)


def _sentences() -> None:
    none = Path("none")
    data = PairData.__new__(PairData)
    finetune(encoder=none, data=data, options=SbertOptions(), seed=0, threads=1, out=none, resume=none)


def _sentence_stage() -> None:
    paths = {
        name: Path("none") for name in ("quantized", "parent_encoder", "cache", "out", "metrics", "curve", "resume")
    }
    finetune_sbert(options=SbertOptions(), seed=0, threads=1, **paths)


@pytest.mark.parametrize("start", [_finish, _sentences, _sentence_stage, lambda: replay(Path("none"))])
@pytest.mark.usefixtures("two")
def test_other_trainings_refuse_several_processes_before_any_work(start: Callable[[], None]) -> None:
    with pytest.raises(FrankensteinError, match=r"runs in one process; found WORLD_SIZE=2. Start it without torchrun"):
        start()


@pytest.mark.usefixtures("two")
def test_a_loop_that_knows_of_no_others_refuses_several_processes(tmp_path: Path) -> None:
    with pytest.raises(FrankensteinError, match="test runs in one process"):
        trainer(tmp_path)
    with pytest.raises(FrankensteinError, match="Objective cannot be trained by several processes"):
        type("SomeObjective", (Objective,), {})().share(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None, "MASTER_PORT": None}, "WORLD_SIZE=2, but RANK, MASTER_PORT not set"),
        ({"RANK": "2"}, "RANK=2, LOCAL_RANK=0, WORLD_SIZE=2: expected 0 <= RANK < WORLD_SIZE"),
        ({"WORLD_SIZE": "many"}, "expected whole numbers"),
        ({"MASTER_PORT": "http"}, "expected whole numbers"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "expected 0 <= RANK < WORLD_SIZE"),
    ],
)
def test_variables_that_make_no_sense_are_named(
    monkeypatch: pytest.MonkeyPatch, two: dict[str, str], change: dict[str, str | None], message: str
) -> None:
    for name, value in {**two, **change}.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(FrankensteinError, match=message), processes():
        pass


@pytest.mark.parametrize("size", [1, None])
def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    if size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", str(size))
    with processes() as together:
        assert together.first and not together.several
        assert together.same(lambda: 3) == 3 and together.sums([1.0, 2.0]) == [1.0, 2.0]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_shares_of_a_batch_are_the_batch(size: int) -> None:
    inputs = torch.arange(5 * 4).reshape(5, 4)
    real = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) > 0.3
    positions = torch.tensor([0, 3, 9, 12, 13, 19])
    batch = MlmBatch(inputs, real, positions, positions + 100, int(real.sum()))
    shares = [batch.share(Processes(rank, size)) for rank in range(size)]
    assert sum(share.tokens for share in shares) == batch.tokens
    assert torch.equal(torch.cat([share.labels for share in shares]), batch.labels)
    chosen = torch.cat([share.inputs.flatten()[share.positions] for share in shares])
    assert torch.equal(chosen, inputs.flatten()[positions])
    idle = [share for share in shares if share.tokens == 0]
    assert len(idle) == max(0, size - 5) and all(len(share.inputs) == 1 for share in idle)
