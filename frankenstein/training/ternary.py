"""The ternary finish: quantization-aware training of a pretrained encoder, then the packed artifact and its report.

    loss = (1 - d) cross-entropy of the labels + d KL(parent || student)        at the masked positions
    w + lambda_w (q(w) - w), x + lambda_a (q(x) - x)                            lambda_w rises first, then lambda_a

Source: two-phase ternary training, https://arxiv.org/abs/2502.11895; distillation from the model's own full-precision
parent, Wu et al. 2025 (BitDistill), https://arxiv.org/abs/2510.13998.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.artifact import new_folder, write_json
from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.storage import TOKENIZER, load_encoder, read_config, save_encoder
from frankenstein.optimizers.groups import build_optimizer
from frankenstein.options import plain
from frankenstein.quantization.artifact import load_latent, load_packed, pack
from frankenstein.quantization.bitlinear import set_strength
from frankenstein.quantization.convert import bitnet_config, convert_to_bitlinear
from frankenstein.quantization.embedding import round_embeddings
from frankenstein.quantization.options import QuantizeOptions
from frankenstein.quantization.report import size_report, zero_share
from frankenstein.runtime import best_device, prepare_torch
from frankenstein.text.shards import TokenRows
from frankenstein.text.tokenizer import Tokenizer
from frankenstein.training.loop import LoopSettings, Objective, Trainer
from frankenstein.training.mlm import MlmBatch, MlmObjective, chosen_logits, mlm_values
from frankenstein.training.options import OptimizerOptions, TrainingOptions
from frankenstein.training.pretrain import fingerprint, mlm_objective, write_curve
from frankenstein.training.processes import only_one_process
from frankenstein.training.row_origins import RowOrigins

logger = logging.getLogger(__name__)
KIND = "quantized"


def strengths(step: int, warmup_steps: int) -> tuple[float, float]:
    """Strengths of weights and activations at a step: each rises in one half of the warm-up, weights first."""
    if warmup_steps == 0:
        return 1.0, 1.0
    done = 2.0 * (step + 1) / warmup_steps
    return min(done, 1.0), min(max(done - 1.0, 0.0), 1.0)


class TernaryObjective(Objective):
    """Masked language modelling under rising quantization, with the full-precision parent as teacher.

    Args:
        labels: gives batches and validation.
        parent: the teacher, in evaluation mode.
        source: the teacher's artifact, for a replay.
        distillation_weight: share of the divergence in the loss; 0 never runs the parent.
        warmup_steps: steps until both strengths are 1.
    """

    def __init__(
        self, labels: MlmObjective, parent: Encoder, source: Path, *, distillation_weight: float, warmup_steps: int
    ) -> None:
        self.labels, self.parent, self.source = labels, parent, source
        self.distillation_weight, self.warmup_steps = distillation_weight, warmup_steps

    def batch(self, step: int, micro: int) -> MlmBatch:
        """The masked batch of a step's micro-batch."""
        return self.labels.batch(step, micro)

    def begin_step(self, model: nn.Module, step: int) -> None:
        """Set the strengths of this step."""
        set_strength(model, *strengths(step, self.warmup_steps))

    def loss(self, model: nn.Module, batch: MlmBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The blend of cross-entropy and divergence, means over the chosen positions; no position gives 0."""
        return finish_loss(model, self.parent, batch, self.distillation_weight)

    def origin(self, step: int, micro: int) -> list[dict[str, Any]]:
        """Where the rows of a micro-batch come from."""
        return self.labels.origin(step, micro)

    def recipe(self) -> dict[str, Any]:
        """The teacher and how much it counts."""
        return {
            "kind": "ternary",
            "parent": str(self.source.resolve()),
            "distillation_weight": self.distillation_weight,
            "warmup_steps": self.warmup_steps,
        }

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy at full strength, whatever the step's strengths are: the model that would be packed."""
        set_strength(model, 1.0, 1.0)
        return self.labels.validate(model)


def finish_loss(
    model: nn.Module, parent: Encoder, batch: MlmBatch, distillation_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The blend of cross-entropy and divergence, plus the encoder's auxiliary losses; and the values to log."""
    count = max(1, len(batch.labels))
    logits = chosen_logits(model, batch).float()
    labels = batch.labels.to(logits.device, non_blocking=True)
    loss = F.cross_entropy(logits, labels, reduction="sum") / count
    if distillation_weight > 0:
        with torch.no_grad():
            target = chosen_logits(parent, batch).float().log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True) / count
        loss = torch.lerp(loss, divergence, distillation_weight)
    auxiliary: dict[str, Tensor] = model.losses()  # type: ignore[operator]
    return loss + sum(auxiliary.values()), mlm_values(logits, labels, batch)


def _hidden(model: nn.Module, batch: MlmBatch) -> Tensor:
    device = next(model.parameters()).device
    real = None if batch.real is None else batch.real.to(device, non_blocking=True)
    hidden: Tensor = model(batch.inputs.to(device, non_blocking=True), real)
    return hidden


def quantize_encoder(  # noqa: PLR0913  the stage's options and paths, each by its name
    *,
    seed: int,
    threads: int,
    options: QuantizeOptions,
    training_options: TrainingOptions,
    encoder: Path,
    tokens: Path,
    out: Path,
    resume: Path,
    metrics: Path,
    curve: Path,
) -> dict[str, Any]:
    """Turn a pretrained encoder ternary, pack it, and report what that costs and saves.

    A full-precision encoder gets the finish; a ternary one is packed as it is; with weights "none" it is only copied.
    Args:
        encoder, tokens: artifacts. out: gets latent/ and packed/, or full/; put in place together.
        resume: folder of checkpoints. metrics: JSON. curve: CSV of the losses by step.
    Returns: what stands in `metrics`.
    Raises: FrankensteinError: when a ternary encoder is asked to stay in full precision, or an artifact is wrong.
    """
    only_one_process("the ternary finish")
    prepare_torch(threads)
    objective = _labels(encoder, tokens, training_options, seed)
    if options.weights == "none":
        summary = _keep_full(encoder, objective, out)
        write_json(metrics, summary)
        write_curve(curve, [])
        return summary
    latent, valid, trainer, history = _load(encoder, options), {}, None, []
    if read_config(encoder)["bitnet"] is None:
        parent = load_encoder(encoder).to(best_device())
        valid = {"full": _validate(objective, parent), "ptq": _validate(objective, latent)}
        values = {"quantize": plain(options), "training": plain(training_options), "seed": seed, "threads": threads}
        mark = fingerprint(values, tokens, encoder)
        teaching = TernaryObjective(
            objective,
            parent,
            encoder,
            distillation_weight=options.distillation_weight,
            warmup_steps=round(options.warmup_fraction * options.steps),
        )
        trainer = _trainer(latent, teaching, options, training_options, seed, resume, mark)
        history = trainer.run()
    set_strength(latent.cpu().eval(), 1.0, 1.0)
    if options.embeddings == "int8":
        round_embeddings(latent.embedding)
    summary = _write(latent, objective, options, encoder, out)
    summary["valid"] = {**valid, **summary["valid"]}
    write_json(metrics, summary)
    write_curve(curve, history)
    if trainer is not None:
        trainer.finish()
    return summary


def _labels(encoder: Path, tokens: Path, options: TrainingOptions, seed: int) -> MlmObjective:
    train, valid = TokenRows.open(tokens, "train"), TokenRows.open(tokens, "valid")
    words = Tokenizer.load(encoder)
    return mlm_objective(words, train, valid, options, seed, RowOrigins(tokens, "train", words))


def _load(encoder: Path, options: QuantizeOptions) -> Encoder:
    """The encoder with BitLinear layers: a ternary one as it was trained, a full-precision one just converted."""
    if read_config(encoder)["bitnet"] is not None:
        return load_latent(encoder)
    ternary = convert_to_bitlinear(
        load_encoder(encoder), scale=options.scale, norm=False, embeddings=options.embeddings == "ternary"
    )
    return ternary.to(best_device())


@torch.no_grad()
def _validate(objective: MlmObjective, model: nn.Module) -> dict[str, float]:
    return {name: round(value, 6) for name, value in objective.validate(model.eval()).items()}


def _trainer(
    latent: Encoder,
    objective: TernaryObjective,
    options: QuantizeOptions,
    training_options: TrainingOptions,
    seed: int,
    resume: Path,
    mark: str,
) -> Trainer:
    """The shared loop, set up for the finish: without weight decay, which would push weights over the thresholds.

    The budgets are those of pretraining; quantize.steps says how long the finish is.
    """
    adamw = OptimizerOptions(optimizer_class="adamw", parameters={"adamw-lr": options.lr, "adamw-wd": 0.0})
    settings = LoopSettings.from_training(training_options, seed)
    return Trainer(
        latent,
        build_optimizer(latent, adamw),
        objective,
        replace(settings, steps=options.steps, scheduler_type="cosine", max_tokens=None, max_seconds=None),
        resume_dir=resume,
        fingerprint=mark,
        log_path=Path(training_options.csv_log_path).with_name("quantize.csv"),
        label="quantize",
    )


def _write(
    latent: Encoder, objective: MlmObjective, options: QuantizeOptions, source: Path, out: Path
) -> dict[str, Any]:
    """Write latent/ and packed/, load the packed model again, and compare the two."""
    config, tokenizer = read_config(source), (source / TOKENIZER).read_bytes()
    common = {"tokenizer": tokenizer, "max_length": config["max_length"], "sentence": config["sentence"]}
    with new_folder(out, KIND) as folder:
        save_encoder(latent, folder / "latent", bitnet=bitnet_config(latent), **common)
        pack(latent, folder / "packed", embeddings=options.embeddings, **common)
        packed = load_packed(folder / "packed", options.backend)
        difference = _largest_difference(latent, packed, objective.validation or [objective.batch(0, 0)])
        logger.info("quantize: packed and trained model differ by at most %g", difference)
        return {
            "valid": {"qat": _validate(objective, latent), "packed": _validate(objective, packed)},
            "packed_max_difference": difference,
            "zero_share": round(zero_share(packed), 6),
            "size_bytes": size_report(latent, packed),
        }


@torch.no_grad()
def _largest_difference(trained: Encoder, packed: Encoder, batches: list[MlmBatch]) -> float:
    """Largest absolute difference of two models' hidden vectors."""
    return max(float((_hidden(trained, b) - _hidden(packed, b)).abs().max()) for b in batches)


def _keep_full(encoder: Path, objective: MlmObjective, out: Path) -> dict[str, Any]:
    """Write full/, a copy of the full-precision encoder."""
    config = read_config(encoder)
    if config["bitnet"] is not None:
        raise FrankensteinError(f"quantize.weights is none, but {encoder} was trained ternary; expected ternary")
    full = load_encoder(encoder)
    with new_folder(out, KIND) as folder:
        save_encoder(
            full,
            folder / "full",
            tokenizer=(encoder / TOKENIZER).read_bytes(),
            max_length=config["max_length"],
            sentence=config["sentence"],
        )
    return {"valid": {"full": _validate(objective, full)}}
