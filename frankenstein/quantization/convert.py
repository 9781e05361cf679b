"""Turn a built model ternary: every `nn.Linear` in its blocks becomes a `BitLinear`; the mixers never know."""

from typing import Any, TypeVar

from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.quantization.bitlinear import SCALES, BitLinear

M = TypeVar("M", bound=nn.Module)


def convert_to_bitlinear(module: M, *, scale: str = "channel", norm: bool = True) -> M:
    """Swap every `nn.Linear` under `module.blocks` for a `BitLinear` on the same parameters, in place.

    A module without `blocks` is converted whole. Layers that are BitLinear already stay as they are.
    Args:
        scale: one scale an output "channel" or one a "tensor".
        norm: normalize the input first, as BitNet b1.58 does; False keeps a trained layer's function at strength 0.
    Returns: module.
    Raises: FrankensteinError: when there is no linear layer, or BitLinear layers with other settings are there already.
    """
    if scale not in SCALES:
        raise FrankensteinError(f"scale {scale!r}; allowed: {', '.join(SCALES)}")
    wanted = {"scale": scale, "norm": norm}
    found = bitnet_config(module)
    if found not in (None, wanted):
        raise FrankensteinError(f"the model is ternary already, with {found}; it cannot be converted to {wanted}")
    root = dict(module.named_children()).get("blocks", module)
    swapped: dict[int, BitLinear] = {}  # a linear that two parents share stays shared
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layer = swapped.setdefault(id(child), BitLinear.from_linear(child, scale=scale, norm=norm))
                setattr(parent, name, layer)
    if not swapped and found is None:
        raise FrankensteinError(f"{type(module).__name__} has no nn.Linear to convert")
    return module


def ternary_layers(module: nn.Module) -> dict[str, BitLinear]:
    """Name -> layer of every BitLinear, in the order of the model."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BitLinear)}


def bitnet_config(module: nn.Module) -> dict[str, Any] | None:
    """{"scale", "norm"} of the model's BitLinear layers, as an encoder artifact records it; None when it has none."""
    layer = next(iter(ternary_layers(module).values()), None)
    return None if layer is None else {"scale": layer.scale, "norm": layer.norm is not None}
