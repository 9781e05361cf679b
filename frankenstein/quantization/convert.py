"""Turn a built model ternary: every `nn.Linear` in its blocks becomes a `BitLinear`; the mixers never know.

Its embedding table may become ternary with them.
"""

from typing import Any, TypeVar

from torch import nn

from frankenstein.errors import FrankensteinError
from frankenstein.quantization.bitlinear import SCALES, BitLinear
from frankenstein.quantization.embedding import TernaryEmbedding

M = TypeVar("M", bound=nn.Module)


def convert_to_bitlinear(module: M, *, scale: str = "channel", norm: bool = True, embeddings: bool = False) -> M:
    """Swap every `nn.Linear` under `module.blocks` for a `BitLinear` on the same parameters, in place.

    A module without `blocks` is converted whole. Layers that are BitLinear already stay as they are.
    Args:
        scale: one scale an output "channel" or one a "tensor".
        norm: normalize the input first, as BitNet b1.58 does; False keeps a trained layer's function at strength 0.
        embeddings: turn the table `module.embedding` into a `TernaryEmbedding` on the same parameter as well.
    Returns: module.
    Raises: FrankensteinError: when there is no linear layer, or BitLinear layers with other settings are there already.
    """
    if scale not in SCALES:
        raise FrankensteinError(f"scale {scale!r}; allowed: {', '.join(SCALES)}")
    wanted = {"scale": scale, "norm": norm, **({"embeddings": True} if embeddings else {})}
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
    table = _table(module)
    if embeddings and isinstance(table, nn.Embedding):
        module.embedding = TernaryEmbedding.from_embedding(table)
    return module


def _table(module: nn.Module) -> nn.Module | None:
    return dict(module.named_children()).get("embedding")


def ternary_layers(module: nn.Module) -> dict[str, BitLinear]:
    """Name -> layer of every BitLinear, in the order of the model."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, BitLinear)}


def bitnet_config(module: nn.Module) -> dict[str, Any] | None:
    """The arguments of `convert_to_bitlinear` that made the model, as an encoder artifact records them; None for float.

    {"scale", "norm"}, and "embeddings" where the table is ternary too.
    """
    layer = next(iter(ternary_layers(module).values()), None)
    if layer is None:
        return None
    table = {"embeddings": True} if isinstance(_table(module), TernaryEmbedding) else {}
    return {"scale": layer.scale, "norm": layer.norm is not None, **table}
