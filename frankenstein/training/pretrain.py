"""Pretraining of the encoder by masked language modelling: from token rows to an encoder artifact and its reports."""

import csv
import hashlib
import io
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from frankenstein import __version__
from frankenstein.artifact import MANIFEST, sha256, write_json, write_text
from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.model.storage import save_encoder
from frankenstein.optimizers.groups import build_optimizer
from frankenstein.options import plain
from frankenstein.quantization.convert import bitnet_config, convert_to_bitlinear
from frankenstein.runtime import best_device, prepare_torch
from frankenstein.text.masking import MaskingRule
from frankenstein.text.shards import TokenRows
from frankenstein.text.tokenizer import Tokenizer
from frankenstein.training.checkpoints import RunState
from frankenstein.training.compiled import compile_layers
from frankenstein.training.loop import LoopSettings, Trainer
from frankenstein.training.mlm import MlmObjective
from frankenstein.training.options import TrainingOptions
from frankenstein.training.parallel import Parallel, check_parallel, parallel_training
from frankenstein.training.processes import ALONE, Processes, processes
from frankenstein.training.row_origins import RowOrigins

logger = logging.getLogger(__name__)
_PACKAGE = Path(__file__).resolve().parent.parent
_ROOMS = ("mixers", "model", "optimizers", "quantization", "text", "training")
_CURVE = ("step", "loss", "valid_loss", "learning_rate")
_LAST = 50  # history rows averaged into the reported training loss


def pretrain(  # noqa: PLR0913  the stage's options and paths, each by its name
    *,
    seed: int,
    threads: int,
    model_options: ModelOptions,
    training_options: TrainingOptions,
    tokens: Path,
    tokenizer: Path,
    out: Path,
    resume: Path,
    metrics: Path,
    curve: Path,
) -> dict[str, Any]:
    """Train an encoder and write its artifact, metrics and curve; an interrupted run goes on from its checkpoint.

    max_tokens and max_seconds may end it before scheduler_total_steps; "ended_by" in the metrics says which limit did.
    Started by torchrun, all processes call this; they share the work, and the first one writes. All read the same
    folders, so several machines need a common file system.
    Args:
        threads: CPU threads of a process; the weights' bits depend on it.
        tokens, tokenizer: artifacts of the text room.
        out: the encoder artifact.
        resume: folder of checkpoints, one subfolder a fingerprint, emptied on success.
        metrics: JSON with final losses and counts. curve: CSV of the losses by step.
    Returns: what stands in `metrics`.
    Raises:
        FrankensteinError: when tokens, tokenizer and options do not fit together, or training was unstable.
    """
    prepare_torch(threads)
    with processes() as together:
        check_parallel(training_options, together)
        words = Tokenizer.load(tokenizer)
        train, valid = TokenRows.open(tokens, "train"), TokenRows.open(tokens, "valid")
        _check_inputs(tokens, train, words, training_options.max_length)
        encoder = _build(model_options, words.vocab_size, training_options.max_length, seed)
        origin = RowOrigins(tokens, "train", words)
        objective = mlm_objective(words, train, valid, training_options, seed, origin, together)
        if training_options.compile:
            compile_layers(encoder, resume.parent / ".compiled")
        parallel = parallel_training(encoder, training_options, together)
        trainer = Trainer(
            encoder,
            build_optimizer(encoder, training_options),
            objective,
            _settings(training_options, seed, train.num_rows),
            resume_dir=resume,
            fingerprint=fingerprint(
                {"model": plain(model_options), "training": plain(training_options), "seed": seed, "threads": threads},
                tokens,
                tokenizer,
            ),
            log_path=Path(training_options.csv_log_path),
            label="pretrain",
            parallel=parallel,
        )
        history = trainer.run()
        summary, whole = _summary(history, encoder, trainer.state), _whole(encoder, parallel, model_options, seed)
        together.same(lambda: _write(whole, words, out, metrics, summary, curve, history))
        trainer.finish()
    return summary


def _settings(options: TrainingOptions, seed: int, num_rows: int) -> LoopSettings:
    rows_per_step = options.batch_size * options.gradient_accumulation_steps
    return LoopSettings.from_training(options, seed, steps_per_epoch=max(1, num_rows // rows_per_step))


def _write(
    encoder: Encoder,
    words: Tokenizer,
    out: Path,
    metrics: Path,
    summary: dict[str, Any],
    curve: Path,
    history: list[dict[str, Any]],
) -> None:
    bitnet = bitnet_config(encoder)
    save_encoder(encoder.cpu(), out, tokenizer=words.model_bytes, max_length=encoder.max_length, bitnet=bitnet)
    write_json(metrics, summary)
    write_curve(curve, history)


def _check_inputs(tokens: Path, train: TokenRows, words: Tokenizer, max_length: int) -> None:
    if train.num_rows == 0:
        raise FrankensteinError(f"{tokens}: the training split has no rows; expected at least one")
    if train.vocab_size != words.vocab_size:
        raise FrankensteinError(
            f"{tokens}: made with a vocabulary of {train.vocab_size}; the tokenizer has {words.vocab_size}"
        )
    if train.max_length != max_length:
        raise FrankensteinError(f"{tokens}: rows of {train.max_length} tokens; training.max_length is {max_length}")


def _build(options: ModelOptions, vocab_size: int, max_length: int, seed: int) -> Encoder:
    torch.manual_seed(seed)
    encoder = Encoder(options, vocab_size=vocab_size, max_length=max_length)
    if options.use_bitnet:
        convert_to_bitlinear(encoder, embeddings=options.use_bitnet_embedding)
    return encoder.to(best_device())


def _whole(encoder: Encoder, parallel: Parallel, options: ModelOptions, seed: int) -> Encoder:
    """The encoder, or a copy with whole weights where the processes have parts of it."""
    weights = parallel.weights()
    if weights is None:
        return encoder
    copy = _build(options, encoder.vocab_size, encoder.max_length, seed)
    copy.load_state_dict(weights)
    return copy


def mlm_objective(
    words: Tokenizer,
    train: TokenRows,
    valid: TokenRows,
    options: TrainingOptions,
    seed: int,
    origins: RowOrigins,
    together: Processes = ALONE,
) -> MlmObjective:
    """The masked-language-model objective over packed rows, with the masks that the options and the seed give."""
    rule = MaskingRule(
        mask_id=words.mask_id,
        special_ids=words.special_ids,
        vocab_size=words.vocab_size,
        probability=options.mlm_probability,
        word_starts=words.word_starts if options.whole_word_masking else None,
    )
    return MlmObjective(
        train,
        valid,
        rule,
        words.pad_id,
        seed=seed,
        batch_size=options.batch_size,
        accumulation=options.gradient_accumulation_steps,
        eval_batches=options.eval_batches,
        origins=origins,
        processes=together,
    )


def fingerprint(values: dict[str, Any], *artifacts: Path) -> str:
    """Hex digest of all that decides a training result: options, input artifacts, versions, the library's code."""
    code = hashlib.sha256()
    for path in sorted(p for room in _ROOMS for p in (_PACKAGE / room).rglob("*.py")):
        code.update(path.relative_to(_PACKAGE).as_posix().encode() + path.read_bytes())
    parts = {
        "values": values,
        "inputs": [sha256(Path(folder) / MANIFEST) for folder in artifacts],
        "versions": [__version__, torch.__version__],
        "code": code.hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _summary(history: list[dict[str, Any]], encoder: Encoder, state: RunState) -> dict[str, Any]:
    """The numbers of a run, rounded to 6 digits; deterministic but where max_seconds ended it."""
    losses = [row["loss"] for row in history if row["loss"] is not None][-_LAST:]
    summary: dict[str, Any] = {
        "train_loss": round(sum(losses) / len(losses), 6),
        "parameters": encoder.parameter_count(),
        "steps": history[-1]["step"],
        "tokens": state.tokens,
        "ended_by": state.ended_by,
    }
    last = history[-1]
    if last.get("valid_loss") is not None:
        summary |= {
            "valid_loss": round(last["valid_loss"], 6),
            "valid_accuracy": round(last["valid_accuracy"], 6),
            "valid_perplexity": round(math.exp(last["valid_loss"]), 6),
        }
    return summary


def write_curve(path: Path, history: list[dict[str, Any]]) -> None:
    """CSV for `dvc plots`: step, loss, valid_loss (empty between validations), learning_rate."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CURVE)
    for row in history:
        values = [row.get(name) for name in _CURVE]
        writer.writerow(["" if v is None else v if isinstance(v, int) else f"{v:.6g}" for v in values])
    write_text(path, stream.getvalue())
