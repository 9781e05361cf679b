"""The folder that an unstable step leaves: the state before it, its batch, and notes that say where it went wrong.

`emergency-<step>` is a checkpoint whose config.json also has what `replay` needs, with `batch.safetensors` (the
micro-batches) and `notes.json`. The notes come from running the batch once more under observation, so that a normal
step costs nothing.
Source: TORMENTED-BERT-Frankenstein, section 8.4.3.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from frankenstein.artifact import write_json
from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.storage import encoder_config
from frankenstein.optimizers.modes import wants_hessian
from frankenstein.quantization.convert import bitnet_config
from frankenstein.training.checkpoints import Dump, generator_states, restore_generators
from frankenstein.training.inspection import Inspection, inspect_step
from frankenstein.training.precision import Precision
from frankenstein.training.run import Run
from frankenstein.training.telemetry import memory_columns

BATCH, NOTES = "batch.safetensors", "notes.json"
REPLAY = "frankenstein-transformer replay"
_MODEL = ("layer_pattern", "num_layers", "num_loops", "norm_type", "use_bitnet", "ode_solver", "ode_steps", "use_moe")
_SETTINGS = ("amp", "amp_dtype", "grad_clip_max_norm", "inf_post_clip_threshold", "gradient_accumulation_steps")


@dataclass(frozen=True)
class BadStep:
    """An unstable step.

    `step` counts the finished steps before it; `values` are those read from it; `generators` are torch's states before
    its forward pass.
    """

    step: int
    values: dict[str, float]
    generators: dict[str, Any]


def save_emergency(run: Run, bad: BadStep) -> tuple[Path, Inspection | str]:
    """Run the bad step again, write its folder, and leave the run as it was.

    Returns: the folder and what the second run showed, or why there was none.
    Raises:
        CheckpointError: when the folder cannot be written.
    """
    batches = [run.objective.batch(bad.step, i) for i in range(run.settings.gradient_accumulation_steps)]
    seen = _seen(run, bad, batches)
    dump = Dump(
        generators={**generator_states(), **bad.generators},
        config=_config(run, bad),
        write=lambda folder: _write(folder, run, bad, batches, seen),
    )
    return run.checkpoints.save("emergency", run.trained, run.state, dump), seen


def _seen(run: Run, bad: BadStep, batches: Sequence[Any]) -> Inspection | str:
    if not run.parallel.whole:
        return "not looked at here, since no process has the whole model"
    parameters = list(run.trained.model.parameters())
    gradients = [p.grad for p in parameters]
    seen = _run_again(run, bad, batches)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return seen


def _run_again(run: Run, bad: BadStep, batches: Sequence[Any]) -> Inspection | str:
    settings, before = run.settings, generator_states()
    scale = bad.values.get("scaler_scale", 1.0)
    precision = Precision(run.precision.device, amp=settings.amp, dtype=settings.amp_dtype, scale=scale)
    restore_generators({**before, **bad.generators})
    try:
        run.objective.begin_step(run.trained.model, bad.step)
        return inspect_step(run.trained.model, batches, run.loss(bad.step), precision)
    except RuntimeError as error:  # out of memory, say: the notes must not cost the checkpoint
        return f"the second run failed: {error}"
    finally:
        restore_generators(before)


def _config(run: Run, bad: BadStep) -> dict[str, Any]:
    model = run.trained.model
    return {
        "label": run.label,
        "bad_step": bad.step,
        "hessian": wants_hessian(run.trained.optimizer, bad.step),
        "scale": bad.values.get("scaler_scale", 1.0),
        "objective": run.objective.recipe(),
        "model": _model_config(model),
        "settings": asdict(run.settings),
        "threads": torch.get_num_threads(),
        "device": str(run.precision.device),
    }


def _model_config(model: nn.Module) -> dict[str, Any] | None:
    if not isinstance(model, Encoder):
        return None
    return encoder_config(model, max_length=model.max_length, bitnet=bitnet_config(model))


def _write(folder: Path, run: Run, bad: BadStep, batches: Sequence[Any], seen: Inspection | str) -> None:
    tensors = {f"{i}.{name}": t for i, batch in enumerate(batches) for name, t in batch_tensors(batch).items()}
    save_file(tensors, folder / BATCH)
    write_json(folder / NOTES, _plain(_notes(run, bad, tensors, seen)))


def _notes(run: Run, bad: BadStep, tensors: dict[str, Tensor], seen: Inspection | str) -> dict[str, Any]:
    """What a reader needs to find the cause."""
    optimizer, settings = run.trained.optimizer, run.settings
    shape = _model_config(run.trained.model)
    return {
        "step": bad.step + 1,
        "weights_of_step": run.state.step,
        "values": bad.values,
        "second_run": seen if isinstance(seen, str) else asdict(seen),
        "not_finite": run.trained.not_finite(),
        "learning_rates": {str(group.get("name", i)): group["lr"] for i, group in enumerate(optimizer.param_groups)},
        "batch": {name: _describe(tensor) for name, tensor in tensors.items()},
        "rows": _rows(run, bad),
        "memory_gb": memory_columns(run.precision.device),
        "settings": {name: value for name, value in asdict(settings).items() if name in _SETTINGS},
        "model": None if shape is None else {name: shape["model"][name] for name in _MODEL},
        "replay": None if run.objective.recipe() is None else f"{REPLAY} <this folder>",
    }


def _rows(run: Run, bad: BadStep) -> list[Any] | str:
    """Where the rows of each micro-batch come from, or why that cannot be told."""
    try:
        return [run.objective.origin(bad.step, i) for i in range(run.settings.gradient_accumulation_steps)]
    except (FrankensteinError, OSError) as error:  # the corpus has moved, say: that must not cost the checkpoint
        return f"unknown: {error}"


def batch_tensors(batch: Any, name: str = "") -> dict[str, Tensor]:
    """Copies of the tensors, arrays and numbers inside a batch of any nesting, by dotted name; others are left out."""
    if isinstance(batch, Tensor):
        return {name: batch.detach().cpu().clone(memory_format=torch.contiguous_format)}
    if isinstance(batch, (bool, int, float)) or hasattr(batch, "__array__"):
        return {name: torch.as_tensor(batch).clone()}
    if isinstance(batch, dict):
        parts = {str(key): value for key, value in batch.items()}
    elif is_dataclass(batch) and not isinstance(batch, type):
        parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
    elif isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        parts = batch._asdict()
    elif isinstance(batch, (list, tuple)):
        parts = {str(i): value for i, value in enumerate(batch)}
    else:
        return {}
    return {k: t for key, part in parts.items() for k, t in batch_tensors(part, f"{name}.{key}".strip(".")).items()}


def _describe(array: Tensor) -> str:
    span = f", {array.min().item()} to {array.max().item()}" if array.numel() else ""
    return f"{tuple(array.shape)} {array.dtype}{span}"


def _plain(value: Any) -> Any:
    """Ready for JSON, which has no NaN: numbers that are not finite as text."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else str(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
