"""Siamese fine-tuning of an encoder into a sentence encoder, through the shared training loop.

A ternary encoder stays ternary from the first step to the last and is packed again at the end; a full-precision one is
trained in the same way, so that the two can be compared.
"""

import csv
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frankenstein.artifact import new_folder, sha256, write_json, write_text
from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.storage import load_encoder, read_config, save_encoder
from frankenstein.optimizers.groups import build_optimizer
from frankenstein.options import plain
from frankenstein.quantization.artifact import load_latent, pack
from frankenstein.quantization.embedding import round_embeddings
from frankenstein.runtime import best_device, prepare_torch
from frankenstein.sentence.encoder import SentenceSettings
from frankenstein.sentence.objective import SiameseObjective
from frankenstein.sentence.options import SbertOptions
from frankenstein.sentence.pairs import PairData, PairSet, task_data
from frankenstein.text.tokenizer import Tokenizer
from frankenstein.training.loop import LoopSettings, Trainer
from frankenstein.training.options import OptimizerOptions
from frankenstein.training.pretrain import fingerprint
from frankenstein.training.processes import only_one_process

logger = logging.getLogger(__name__)
_ROOM = Path(__file__).resolve().parent
_LAST = 50  # history rows averaged into the reported training loss
_CURVE = ("step", "model", "loss", "learning_rate", "dev_spearman")


@dataclass
class Tuned:
    """A fine-tuned encoder in memory, with what its artifact and reports need."""

    encoder: Encoder
    config: dict[str, Any]
    tokenizer: Tokenizer
    settings: SentenceSettings
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    trainer: Trainer

    def save(self, folder: Path, embeddings: str) -> None:
        """Write the artifact: packed where the encoder is ternary, with this storage of its embeddings."""
        model, length = self.encoder.cpu().eval(), self.config["max_length"]
        words, sentence = self.tokenizer.model_bytes, self.settings.to_config()
        if self.config["bitnet"] is None:
            save_encoder(model, folder, tokenizer=words, max_length=length, sentence=sentence)
        else:
            if embeddings == "int8":
                round_embeddings(model.embedding)  # so that the packed model is the one in memory, bit for bit
            pack(model, folder, tokenizer=words, max_length=length, sentence=sentence, embeddings=embeddings)


def finetune_sbert(  # noqa: PLR0913  the stage's options and paths, each by its name
    *,
    quantized: Path,
    parent_encoder: Path,
    cache: Path,
    options: SbertOptions,
    seed: int,
    threads: int,
    out: Path,
    metrics: Path,
    curve: Path,
    resume: Path,
) -> dict[str, Any]:
    """Fine-tune the ternary encoder and its full-precision parent on the same pairs, in the same order.

    Args:
        quantized: folder with latent/ and packed/ (the ternary encoder), or only full/.
        parent_encoder: the encoder before quantization; skipped when it was trained ternary itself.
        cache: corpus_cache artifact with the tasks' pairs.
        threads: CPU threads; the weights' bits depend on it.
        out: folder for ternary/ (packed_encoder) and full/ (encoder), put in place together.
        metrics: JSON with losses and development scores by model. curve: CSV of them by step.
        resume: folder of checkpoints, emptied on success.
    Returns:  what stands in `metrics`.
    Raises:   FrankensteinError: when a task has no training pairs, or an input is missing or damaged.
    """
    only_one_process("sentence fine-tuning")
    prepare_torch(threads)
    sources = _sources(quantized, parent_encoder)
    data = task_data(cache, options.tasks, options.dev_pairs)
    common = {"seed": seed, "threads": threads}
    tuned = {name: _tune(name, folder, data, options, resume=resume, **common) for name, folder in sources.items()}
    storage = _embedding_storage(quantized)
    with new_folder(out, "sbert") as folder:
        for name, model in tuned.items():
            model.save(folder / name, storage)
    summary = {name: model.summary for name, model in tuned.items()}
    write_json(metrics, summary)
    write_text(curve, _curve({name: model.history for name, model in tuned.items()}))
    for model in tuned.values():
        model.trainer.finish()
    return summary


def finetune(
    *, encoder: Path, data: PairData, options: SbertOptions, seed: int, threads: int, out: Path, resume: Path
) -> dict[str, Any]:
    """Fine-tune one encoder artifact on any pairs.

    Args:
        encoder: a full-precision encoder, or the latent weights of a ternary one; a packed one cannot be trained.
        data: of `files.file_data` or `pairs.task_data`.
        out: the new artifact: encoder, or packed_encoder where `encoder` is ternary.
        resume: folder of checkpoints, emptied on success.
    Returns:  training loss, development scores, steps and pairs.
    """
    only_one_process("sentence fine-tuning")
    prepare_torch(threads)
    tuned = _tune("sentence", encoder, data, options, resume=resume, seed=seed, threads=threads)
    tuned.save(out, "int8")
    tuned.trainer.finish()
    return tuned.summary


def _sources(quantized: Path, parent: Path) -> dict[str, Path]:
    """The encoders to fine-tune, by the name of their result."""
    sources = {}
    if (quantized / "latent").is_dir():
        sources["ternary"] = quantized / "latent"
    if read_config(parent)["bitnet"] is None:
        sources["full"] = parent
    if not sources:
        raise FrankensteinError(
            f"{quantized}: found no latent/ folder; expected the ternary encoder of the quantize stage"
        )
    return sources


def _embedding_storage(quantized: Path) -> str:
    """How the quantize stage stored the embeddings."""
    packed = quantized / "packed"
    return str(read_config(packed)["packed"]["embeddings"]) if packed.is_dir() else "int8"


def _tune(
    name: str, folder: Path, data: PairData, options: SbertOptions, *, resume: Path, seed: int, threads: int
) -> Tuned:
    """Train one encoder to the last step; the result is in memory."""
    config = read_config(folder)
    if config["kind"] != "encoder":
        raise FrankensteinError(
            f"{folder}: is a packed encoder, which cannot be trained; expected latent or full weights"
        )
    encoder = (load_encoder(folder) if config["bitnet"] is None else load_latent(folder)).to(best_device())
    words = Tokenizer.load(folder)
    settings = SentenceSettings(options.pooling, options.normalize, options.max_length)
    sets = {task: PairSet(pairs, words, options.max_length) for task, pairs in data.dev.items()}
    objective = SiameseObjective(PairSet(data.train, words, options.max_length), data.sizes, sets, options, seed)
    trainer = Trainer(
        encoder,
        build_optimizer(encoder, _optimizer(options)),
        objective,
        _loop_settings(objective, options, seed),
        resume_dir=resume,
        fingerprint=_fingerprint(folder, data, options, seed=seed, threads=threads),
        log_path=None,
        label=f"sbert {name}",
    )
    logger.info("sbert %s: %d pairs, %d steps", name, len(data.train), objective.steps)
    history = trainer.run()
    summary = _summary(history, len(data.train))
    return Tuned(encoder, config, words, settings, history, summary, trainer)


def _optimizer(options: SbertOptions) -> OptimizerOptions:
    return OptimizerOptions("adamw", {"adamw-lr": options.lr, "adamw-wd": options.weight_decay, "adamw-wd_norms": 0.0})


def _loop_settings(objective: SiameseObjective, options: SbertOptions, seed: int) -> LoopSettings:
    """The last weights are kept, so no best checkpoint is; a development score ends each epoch."""
    return LoopSettings(
        steps=objective.steps,
        seed=seed,
        warmup_ratio=options.warmup_ratio,
        eval_every_n_steps=objective.order.steps_per_epoch,
        checkpoint_every_n_steps=options.checkpoint_every_n_steps,
        max_rolling_checkpoints=1,
        num_best_checkpoints=0,
        steps_per_epoch=objective.order.steps_per_epoch,
    )


def _fingerprint(folder: Path, data: PairData, options: SbertOptions, *, seed: int, threads: int) -> str:
    code = {path.name: sha256(path) for path in sorted(_ROOM.glob("*.py"))}
    values = {"sbert": plain(options), "seed": seed, "threads": threads, "pairs": data.digest, "code": code}
    return fingerprint(values, folder)


def _summary(history: list[dict[str, Any]], pairs: int) -> dict[str, Any]:
    losses = [row["loss"] for row in history if row["loss"] is not None][-_LAST:]
    last = history[-1]
    scores = {
        k.removeprefix("valid_spearman_"): round(v, 6) for k, v in last.items() if k.startswith("valid_spearman_")
    }
    summary = {"train_loss": round(sum(losses) / len(losses), 6), "steps": last["step"], "pairs": pairs}
    if scores:
        summary |= {
            "dev_loss": round(last["valid_loss"], 6),
            "dev_spearman": {**scores, "mean": round(last["valid_spearman"], 6)},
        }
    return summary


def _curve(histories: Mapping[str, list[dict[str, Any]]]) -> str:
    """CSV for `dvc plots`; the development score is empty between validations."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CURVE)
    for name, history in histories.items():
        for row in history:
            values = [row["loss"], row["learning_rate"], row.get("valid_spearman")]
            writer.writerow([row["step"], name, *("" if v is None else f"{v:.6g}" for v in values)])
    return stream.getvalue()
