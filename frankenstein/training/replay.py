"""Run the step that an emergency folder holds again: same state, same batch, every module looked at."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from frankenstein.artifact import open_folder, read_json
from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.storage import load_encoder
from frankenstein.options import build
from frankenstein.quantization.bitlinear import set_strength
from frankenstein.quantization.convert import convert_to_bitlinear
from frankenstein.runtime import best_device, prepare_torch
from frankenstein.training.accumulation import Loss
from frankenstein.training.checkpoints import KIND, STATE, WEIGHTS, restore_generators
from frankenstein.training.emergency import BATCH, NOTES
from frankenstein.training.inspection import Inspection, describe, inspect_step
from frankenstein.training.mlm import MlmBatch, sampled_loss, training_loss
from frankenstein.training.precision import Precision
from frankenstein.training.processes import only_one_process
from frankenstein.training.run import sampled
from frankenstein.training.ternary import finish_loss, strengths


class Recipe(NamedTuple):
    """How the batch and the loss of one kind of objective are built again from an emergency folder.

    `batch` takes the tensors of a micro-batch by name; `loss` takes the folder's config, the model and its device.
    """

    batch: Callable[[dict[str, Tensor]], Any]
    loss: Callable[[dict[str, Any], Encoder, torch.device], Loss]


class Replay(NamedTuple):
    """What was recorded when the step went wrong, and what its second run shows."""

    config: dict[str, Any]
    notes: dict[str, Any]
    device: torch.device
    seen: Inspection


def replay(folder: Path, further: Mapping[str, Recipe] | None = None) -> Replay:
    """Run the step of an emergency folder again, on the GPU if there is one, with the recorded number of threads.

    Args:
        further: recipes of objectives that are not of this package, by the "kind" of their `Objective.recipe`.
    Raises:
        FrankensteinError: when the folder is no emergency checkpoint, is damaged, or holds a loss that cannot be built
            from it.
    """
    only_one_process("replay")
    config = open_folder(folder, KIND)
    if not (folder / BATCH).is_file() or "objective" not in config:
        raise FrankensteinError(f"{folder}: has no {BATCH}; expected an emergency checkpoint (emergency-<step>)")
    recipes = {**_RECIPES, **(further or {})}
    recorded = config["objective"]
    if recorded is None or recorded["kind"] not in recipes or config["model"] is None:
        kind = config["label"] if recorded is None else recorded["kind"]
        raise FrankensteinError(
            f"{folder}: the loss of {kind!r} cannot be built again from the folder; expected one of "
            f"{', '.join(recipes)}. {NOTES} there has what was found when the step went wrong"
        )
    recipe = recipes[recorded["kind"]]
    prepare_torch(config["threads"])
    device, settings = best_device(), config["settings"]
    model = _model(config["model"])
    load_model(model, str(folder / WEIGHTS))
    model = model.to(device)
    loss = recipe.loss(config, model, device)
    precision = Precision(device, amp=settings["amp"], dtype=settings["amp_dtype"], scale=config["scale"])
    restore_generators(torch.load(folder / STATE, weights_only=True, map_location="cpu")["generators"])
    seen = inspect_step(model, _batches(folder / BATCH, recipe), loss, precision)
    return Replay(config, read_json(folder / NOTES), device, seen)


def report(result: Replay) -> list[str]:
    """The result as lines of text: what was recorded, what the second run shows, and where the rows come from."""
    config, seen, recorded = result.config, result.seen, result.notes["values"]
    lines = [f"{config['label']}: step {config['bad_step'] + 1} of {config['settings']['steps']}, on {result.device}"]
    if recorded:
        lines.append(f"recorded: loss {recorded['loss']}, gradient norm {recorded['grad_norm_before_clip']}")
    lines.append(f"now: loss {seen.loss:g}, gradient norm {seen.gradient_norm:g}")
    lines.append(f"first not finite: {describe(seen.first_bad)}")
    lists = {"gradients not finite": seen.gradients_not_finite, "gradients above 1000": seen.gradients_above_1000}
    lists["weights or optimizer state not finite"] = result.notes["not_finite"]
    lines += [f"{title}: {', '.join(names)}" for title, names in lists.items() if names]
    lines.append("largest gradients: " + (", ".join(f"{name} {norm:g}" for name, norm in seen.largest) or "none"))
    if torch.device(config["device"]).type != result.device.type:
        lines.append(f"the run was on {config['device']}: dropout and rounding differ here")
    return [*lines, _rows(result.notes["rows"])]


def _rows(found: list[list[dict[str, Any]]] | str) -> str:
    if isinstance(found, str):
        return f"training rows: {found}"
    return f"training rows: {', '.join(str(row['row']) for micro in found for row in micro)}; texts in {NOTES}"


def _model(config: dict[str, Any]) -> Encoder:
    options = build(ModelOptions, config["model"])
    encoder = Encoder(options, vocab_size=config["vocab_size"], max_length=config["max_length"])
    return encoder if config["bitnet"] is None else convert_to_bitlinear(encoder, **config["bitnet"])


def _batches(file: Path, recipe: Recipe) -> list[Any]:
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        micro, _, name = key.partition(".")
        parts.setdefault(int(micro), {})[name] = tensor
    return [recipe.batch(parts[micro]) for micro in sorted(parts)]


def _mlm(config: dict[str, Any], model: Encoder, device: torch.device) -> Loss:
    return (
        sampled(sampled_loss, (config["settings"]["seed"], config["bad_step"])) if config["hessian"] else training_loss
    )


def _ternary(config: dict[str, Any], model: Encoder, device: torch.device) -> Loss:
    recipe = config["objective"]
    parent = load_encoder(recipe["parent"]).to(device)
    set_strength(model, *strengths(config["bad_step"], recipe["warmup_steps"]))

    def loss(model: nn.Module, batch: MlmBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return finish_loss(model, parent, batch, recipe["distillation_weight"])

    return loss


_RECIPES = {"mlm": Recipe(MlmBatch.from_tensors, _mlm), "ternary": Recipe(MlmBatch.from_tensors, _ternary)}
