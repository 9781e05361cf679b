"""What packing saves: bytes of the ternary layers and of the whole model, and the share of zero weights."""

from typing import Any

from torch import nn

from frankenstein.quantization.packing import size_table
from frankenstein.quantization.runtime import PackedTernaryLinear


def packed_layers(packed: nn.Module) -> list[PackedTernaryLinear]:
    """Every packed layer, in the order of the model."""
    return [layer for layer in packed.modules() if isinstance(layer, PackedTernaryLinear)]


def size_report(latent: nn.Module, packed: nn.Module) -> dict[str, Any]:
    """Bytes of a ternary model in float and packed.

    Returns:
        ternary_layers: `size_table` of the weight matrices, plus packed, what they and their scales take here.
        model: all parameters in float32 and float16, all tensors as packed, and float32 / packed.
    """
    layers = packed_layers(packed)
    parameters = sum(p.numel() for p in latent.parameters())
    packed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in packed.state_dict().values())
    sizes = size_table((layer.out_features, layer.in_features) for layer in layers)
    return {
        "ternary_layers": {**sizes, "packed": sum(layer.qweight.numel() + 4 * layer.scale.numel() for layer in layers)},
        "model": {
            "parameters": parameters,
            "float32": 4 * parameters,
            "float16": 2 * parameters,
            "packed": packed_bytes,
            "ratio_to_float32": round(4 * parameters / packed_bytes, 4),
        },
    }


def zero_share(packed: nn.Module) -> float:
    """Share of ternary weights that are 0."""
    layers = packed_layers(packed)
    zeros = sum(int((layer.codes == 0).sum()) for layer in layers)
    return zeros / sum(layer.codes.numel() for layer in layers)
