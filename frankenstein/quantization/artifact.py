"""The packed encoder artifact: 2-bit weights, few-bit embeddings, and a probe that shows whether a machine agrees.

`config.json` is that of an encoder plus "packed": every ternary layer by name, so nothing is ever guessed from values.
`model.safetensors` holds the packed layers' tensors (see `PackedTernaryLinear`), everything else in float32, and the
probe: fixed token ids and the hidden vectors that the reference backend gave for them.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from frankenstein.artifact import ArtifactError, new_folder
from frankenstein.errors import FrankensteinError
from frankenstein.model.encoder import Encoder
from frankenstein.model.storage import TOKENIZER, WEIGHTS, empty_encoder, encoder_config, load_encoder, read_config
from frankenstein.quantization.bitlinear import BitLinear
from frankenstein.quantization.convert import bitnet_config, convert_to_bitlinear, ternary_layers
from frankenstein.quantization.embedding import Int8Embedding, PackedTernaryEmbedding, TernaryEmbedding
from frankenstein.quantization.runtime import Backend, PackedTernaryLinear, choose_backend

KIND = "packed_encoder"
CODEC = "2bit_planar"
EMBEDDINGS = ("int8", "float32", "ternary")
# Backends are bit-equal, but the float layers between them differ in the last bit from CPU to CPU, and roundings
# that flip move the probe's output by some thousandths; damaged weights move it by its own size.
PROBE_TOLERANCE = 0.05
_PROBE_IDS, _PROBE_OUTPUT = "probe.input_ids", "probe.output"


def to_packed(encoder: Encoder, *, embeddings: str = "int8", backend: str = "reference") -> Encoder:
    """A packed copy of a ternary encoder, on the CPU, for inference; `encoder` stays as it is.

    Raises: FrankensteinError: when the encoder has no BitLinear layers, they are not at full strength, or embeddings
        "ternary" are asked for and the table was not trained so.
    """
    storage = _storage(encoder, embeddings)
    layers = ternary_layers(encoder)
    if not layers:
        raise FrankensteinError("the encoder has no BitLinear layers; convert_to_bitlinear and train it before packing")
    for name, layer in layers.items():
        if (layer.lambda_w, layer.lambda_a) != (1.0, 1.0):
            found = f"strength {layer.lambda_w}, {layer.lambda_a}"
            raise FrankensteinError(f"{name} is quantized at {found}; packing needs 1, 1 (set_strength)")
    chosen = choose_backend(backend)
    packed = copy.deepcopy(encoder).cpu()
    _swap(packed, lambda layer: PackedTernaryLinear.from_bitlinear(layer, chosen))
    if storage == "int8":
        packed.embedding = Int8Embedding.from_embedding(packed.embedding)  # type: ignore[assignment]
    elif storage == "ternary":
        packed.embedding = PackedTernaryEmbedding.from_ternary(packed.embedding)  # type: ignore[assignment,arg-type]
    return packed.requires_grad_(False).eval()


def _storage(encoder: Encoder, embeddings: str) -> str:
    """How the table is stored; a ternary one is always stored as ternary, which loses nothing."""
    if embeddings not in EMBEDDINGS:
        raise FrankensteinError(f"embeddings {embeddings!r}; allowed: {', '.join(EMBEDDINGS)}")
    if isinstance(encoder.embedding, TernaryEmbedding):
        return "ternary"
    if embeddings == "ternary":
        raise FrankensteinError(
            "embeddings 'ternary': the table was trained in full precision; "
            "set model.use_bitnet_embedding, or let the ternary finish train it (quantize.embeddings)"
        )
    return embeddings


def _swap(encoder: Encoder, make: Callable[[BitLinear], PackedTernaryLinear]) -> None:
    """Put `make(layer)` in the place of every BitLinear."""
    for name, layer in ternary_layers(encoder).items():
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, make(layer))


def pack(
    encoder: Encoder,
    folder: str | Path,
    *,
    tokenizer: bytes = b"",
    sentence: dict[str, Any] | None = None,
    max_length: int | None = None,
    embeddings: str = "int8",
) -> None:
    """Write a packed_encoder artifact of a ternary encoder; it appears whole or not at all.

    Args:
        tokenizer: bytes of the SentencePiece model.
        sentence: pooling, normalize and max_length of a sentence encoder.
        max_length: tokens in a pretraining row; None takes the encoder's.
        embeddings: "int8" (a scale a row), "float32" or "ternary". The packed model equals the trained one bit for bit
            when its table lies on the int8 grid (`round_embeddings`), is stored in float32, or was trained ternary;
            then it is stored so whatever is asked for.
    Raises: FrankensteinError: as `to_packed`, or when the encoder's output is not finite.
    """
    packed = to_packed(encoder, embeddings=embeddings)
    length = encoder.max_length if max_length is None else max_length
    ids = _probe_ids(encoder.vocab_size, length)
    output = _hidden(packed, ids)
    if not bool(output.isfinite().all()):
        raise FrankensteinError(f"{folder}: not packed, because the encoder's output is not finite")
    config = encoder_config(encoder, max_length=length, sentence=sentence, bitnet=bitnet_config(encoder))
    config["packed"] = {
        "codec": CODEC,
        "embeddings": _storage(encoder, embeddings),
        "layers": _layer_list(packed),
        "probe_tolerance": PROBE_TOLERANCE,
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in packed.state_dict().items()}
    with new_folder(folder, KIND, config) as temporary:
        save_file({**tensors, _PROBE_IDS: ids, _PROBE_OUTPUT: output}, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / TOKENIZER).write_bytes(tokenizer)


def load_packed(folder: str | Path, backend: str = "auto") -> Encoder:
    """The encoder of a packed_encoder artifact: `Encoder`'s interface, packed layers, evaluation mode, no gradients.

    Args: backend: auto, int_mm, onednn or reference; `runtime.set_backend` changes it, `.backend` of a layer tells it.
    Raises:
        ArtifactError: when the folder is missing, damaged or of another kind, its tensors do not fit its config, a
            weight has the code 0b11, or the probe comes out different.
        FrankensteinError: for an unknown backend.
    """
    chosen = choose_backend(backend)
    config = read_config(folder)
    if config["kind"] != KIND:
        raise ArtifactError(f"{folder}: is an {config['kind']} artifact; expected {KIND}")
    packed = _empty_packed(folder, config, chosen)
    tensors = _read(Path(folder) / WEIGHTS)
    probe = {name: tensors.pop(name, None) for name in (_PROBE_IDS, _PROBE_OUTPUT)}
    _fill(packed, tensors, Path(folder) / WEIGHTS)
    _check_probe(folder, packed, probe, config["packed"]["probe_tolerance"])
    return packed


def load_latent(folder: str | Path) -> Encoder:
    """The ternary encoder of an encoder artifact, with latent float weights, to train on or to pack.

    Raises: ArtifactError: when the folder is missing, damaged, or holds no ternary encoder.
    """
    if read_config(folder)["bitnet"] is None:
        raise ArtifactError(f"{folder}: is a full-precision encoder; expected the latent weights of a ternary one")
    return load_encoder(folder, prepare=lambda encoder, config: _convert(encoder, config))


def _convert(encoder: Encoder, config: dict[str, Any]) -> None:
    convert_to_bitlinear(encoder, **config["bitnet"])


def _empty_packed(folder: str | Path, config: dict[str, Any], backend: Backend) -> Encoder:
    """An unfilled packed encoder of the shape in the config."""
    settings = config.get("packed") or {}
    if settings.get("codec") != CODEC or settings.get("embeddings") not in EMBEDDINGS:
        raise ArtifactError(f"{folder}/config.json: unknown packing {settings}; expected codec {CODEC}")
    encoder = empty_encoder(folder, config)
    _convert(encoder, config)
    _swap(encoder, lambda layer: PackedTernaryLinear.like(layer, backend))
    stored = {"int8": Int8Embedding, "ternary": PackedTernaryEmbedding}.get(settings["embeddings"])
    if stored is not None:
        encoder.embedding = stored(*encoder.embedding.weight.shape)  # type: ignore[assignment]
    if _layer_list(encoder) != settings["layers"]:
        raise ArtifactError(f"{folder}/config.json: its list of ternary layers does not fit its model options")
    return encoder.requires_grad_(False).eval()


def _layer_list(packed: nn.Module) -> list[dict[str, Any]]:
    """Name and shape of every packed layer, in the order of the model."""
    return [
        {"name": name, "in_features": layer.in_features, "out_features": layer.out_features}
        for name, layer in packed.named_modules()
        if isinstance(layer, PackedTernaryLinear)
    ]


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: not readable as safetensors ({error})") from None


def _fill(packed: Encoder, tensors: dict[str, Tensor], file: Path) -> None:
    """Load the tensors and decode the weights; every difference ends in one message."""
    expected = packed.state_dict()
    wrong = [name for name, tensor in expected.items() if name in tensors and tensors[name].dtype != tensor.dtype]
    if wrong:
        raise ArtifactError(f"{file}: does not fit config.json: wrong number type of {', '.join(wrong)}")
    try:
        packed.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{file}: does not fit config.json: {' '.join(str(error).split())}") from None
    for name, layer in packed.named_modules():
        if isinstance(layer, (PackedTernaryLinear, PackedTernaryEmbedding)):
            try:
                layer.unpack()
            except FrankensteinError as error:
                raise ArtifactError(f"{file}: {name}.qweight: {error}") from None


def _probe_ids(vocab_size: int, max_length: int) -> Tensor:
    """Two fixed rows of ids, spread over the vocabulary."""
    length = min(max_length, 16)
    return (torch.arange(2 * length).view(2, length) * 7919 + 5) % vocab_size


@torch.no_grad()
def _hidden(packed: Encoder, ids: Tensor) -> Tensor:
    hidden: Tensor = packed(ids)
    return hidden.contiguous()


def _check_probe(folder: str | Path, packed: Encoder, probe: dict[str, Tensor | None], tolerance: float) -> None:
    """Compare with the output at packing time: relative distance ||got - expected|| / ||expected||."""
    ids, expected = probe[_PROBE_IDS], probe[_PROBE_OUTPUT]
    if ids is None or expected is None:
        raise ArtifactError(f"{Path(folder) / WEIGHTS}: lacks {_PROBE_IDS} or {_PROBE_OUTPUT}")
    distance = float((_hidden(packed, ids) - expected).norm() / expected.norm().clamp_min(1e-12))
    if not distance <= tolerance:
        raise ArtifactError(
            f"{folder}: the stored probe comes out different (relative distance {distance:.3g}, allowed {tolerance}); "
            "the weights are damaged, or this machine or version computes something else"
        )
