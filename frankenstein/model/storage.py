"""Encoder artifacts: weights in safetensors, the tokenizer, and a config that says how to build the encoder again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from frankenstein.artifact import ArtifactError, new_folder, open_folder
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions
from frankenstein.options import build, plain

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.model"
SPECIAL_IDS = {"pad_id": 0, "unk_id": 1, "cls_id": 2, "sep_id": 3, "mask_id": 4}
_KEYS = ("model", "vocab_size", "max_length", "tokenizer", "sentence", "bitnet")

Prepare = Callable[[Encoder, dict[str, Any]], None]


def encoder_config(
    encoder: Encoder, *, max_length: int, sentence: dict[str, Any] | None = None, bitnet: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of an encoder artifact."""
    return {
        "model": plain(encoder.options),
        "vocab_size": encoder.vocab_size,
        "max_length": max_length,
        "tokenizer": dict(SPECIAL_IDS),
        "sentence": sentence,
        "bitnet": bitnet,
    }


def save_encoder(
    encoder: Encoder,
    folder: str | Path,
    *,
    tokenizer: bytes,
    max_length: int,
    sentence: dict[str, Any] | None = None,
    bitnet: dict[str, Any] | None = None,
) -> None:
    """Write an encoder artifact; it appears whole or not at all.

    Args:
        tokenizer: the SentencePiece model file's bytes.
        max_length: tokens in a pretraining row.
        sentence: pooling, normalize and max_length of a sentence encoder; None for a plain encoder.
        bitnet: scale and norm of the ternary layers whose latent weights these are; None for full precision.
    """
    config = encoder_config(encoder, max_length=max_length, sentence=sentence, bitnet=bitnet)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    with new_folder(folder, "encoder", config) as temporary:
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / TOKENIZER).write_bytes(tokenizer)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The checked config.json of an encoder or packed encoder, with "kind" added.

    Raises:
        ArtifactError: if the folder is missing, damaged, of another kind, or its config lacks a key.
    """
    config = open_folder(folder, "encoder", "packed_encoder")
    missing = [key for key in _KEYS if key not in config]
    if missing:
        raise ArtifactError(f"{folder}/config.json: lacks {', '.join(missing)}; expected {', '.join(_KEYS)}")
    return config


def empty_encoder(folder: str | Path, config: dict[str, Any]) -> Encoder:
    """An encoder of the shape that a checked config describes, with fresh weights.

    Raises:
        ArtifactError: if the config has model options that this version does not know.
    """
    known = {f.name for f in dataclasses.fields(ModelOptions)}
    unknown = sorted(set(config["model"]) - known)
    if unknown:
        raise ArtifactError(
            f"{folder}/config.json: unknown model options {', '.join(unknown)}; written by another version?"
        )
    with torch.random.fork_rng(devices=[]):
        return Encoder(build(ModelOptions, config["model"]), config["vocab_size"], config["max_length"])


def load_encoder(folder: str | Path, prepare: Prepare | None = None) -> Encoder:
    """The encoder of an artifact folder, in evaluation mode.

    Args:
        prepare: called with the fresh encoder and the config before the weights are put in; it turns the encoder
            ternary where config["bitnet"] says so. Without it, only full-precision encoders load.
    Raises:
        ArtifactError: if the folder is missing, damaged or packed, its tensors do not fit its config, or it is ternary
            and `prepare` is None.
    """
    config = read_config(folder)
    if config["kind"] != "encoder":
        raise ArtifactError(
            f"{folder}: is a {config['kind']} artifact; expected encoder (frankenstein.load_packed reads packed ones)"
        )
    if config["bitnet"] is not None and prepare is None:
        raise ArtifactError(
            f"{folder}: holds the latent weights of a ternary encoder; expected full precision "
            "(frankenstein.quantization loads latent and packed ternary encoders)"
        )
    encoder = empty_encoder(folder, config)
    if prepare is not None:
        prepare(encoder, config)
    encoder.load_state_dict(_read_weights(Path(folder) / WEIGHTS, encoder.state_dict()))
    return encoder.eval()


def _read_weights(file: Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file, if they are exactly those expected; else one message with every difference."""
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: not readable as safetensors ({error})") from None
    wrong = [f"lacks {name}" for name in expected if name not in found]
    wrong += [f"has an unexpected {name}" for name in found if name not in expected]
    wrong += [
        f"{name} is {_describe(found[name])}, expected {_describe(tensor)}"
        for name, tensor in expected.items()
        if name in found and _describe(found[name]) != _describe(tensor)
    ]
    if wrong:
        raise ArtifactError(f"{file}: does not fit config.json: {'; '.join(wrong)}")
    return found


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
