"""The packed layers and their integer backends. No float master of a ternary weight exists here.

Every backend multiplies int8 codes into int32 sums, so all are equal bit for bit; `reference` is the oracle. A packed
layer keeps its 2-bit weights and, for the matrix product, their int8 codes.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.model.norms import rms_norm
from frankenstein.quantization.bitlinear import NORM_EPS, BitLinear, activation_codes, rescale, ternary_quantize
from frankenstein.quantization.packing import pack_rows, packed_width, unpack_rows

log = logging.getLogger(__name__)

# |sum| <= 127 in_features must stay below 2^24, where float32 still holds every integer.
MAX_IN_FEATURES = (2**24 - 1) // 127


@dataclass(frozen=True)
class Backend:
    """One way to multiply codes: (M, K) int8, (N, K) int8 -> (M, N) int32."""

    name: str
    multiply: Callable[[Tensor, Tensor], Tensor]


def _multiply_reference(x: Tensor, weight: Tensor) -> Tensor:
    return x.to(torch.int32) @ weight.to(torch.int32).T


def _multiply_int_mm(x: Tensor, weight: Tensor) -> Tensor:
    if not x.is_cuda:
        return torch._int_mm(x, weight.T)
    # cuBLASLt wants more than 16 rows, and K and N that are multiples of 8; zeros change no sum.
    rows, columns = x.shape[0], weight.shape[0]
    inner = -x.shape[1] % 8
    x = F.pad(x, (0, inner, 0, max(0, 17 - rows)))
    weight = F.pad(weight, (0, inner, 0, -columns % 8))
    return torch._int_mm(x, weight.T)[:rows, :columns]


BACKENDS = {b.name: b for b in (Backend("int_mm", _multiply_int_mm), Backend("reference", _multiply_reference))}


def choose_backend(name: str = "auto", device: torch.device | str = "cpu") -> Backend:
    """The backend of this name; "auto" takes the fastest that this machine has and computes right.

    Raises: FrankensteinError: for an unknown name, or one that does not work on `device`.
    """
    if name == "auto":
        chosen = next(b for b in BACKENDS.values() if b.name == "reference" or _works(b, device))
        log.info("ternary backend: %s (automatic)", chosen.name)
        return chosen
    if name not in BACKENDS:
        raise FrankensteinError(f"unknown ternary backend {name!r}; known: auto, {', '.join(sorted(BACKENDS))}")
    if name != "reference" and not _works(BACKENDS[name], device):
        raise FrankensteinError(f"ternary backend {name!r} does not work on {device}; use auto or reference")
    return BACKENDS[name]


def _works(backend: Backend, device: torch.device | str) -> bool:
    """Whether the backend gives the oracle's integers on this device, for one row and for odd sizes."""
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 16, 8), (5, 33, 7), (32, 64, 24)):
        x = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
        weight = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=generator)
        try:
            got = backend.multiply(x.to(device), weight.to(device))
        except RuntimeError as error:
            log.info("ternary backend %s is not available: %s", backend.name, str(error).split("\n")[0])
            return False
        if not torch.equal(got.cpu(), _multiply_reference(x, weight)):
            log.warning("ternary backend %s computes wrong integers on %s and is not used", backend.name, device)
            return False
    return True


class PackedTernaryLinear(nn.Module):
    """Linear layer on packed ternary weights and int8 activations, for inference: (..., in) -> (..., out) float32.

    Saved tensors: qweight (out, ceil(in / 4)) uint8, scale (1,) or (out,), and bias (out,), norm_weight (in,) where the
    layer has them. After they are filled in, `unpack` decodes the weights for the backend.
    """

    qweight: Tensor
    scale: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    codes: Tensor

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, scale: str, norm: bool, backend: Backend
    ) -> None:
        super().__init__()
        if in_features > MAX_IN_FEATURES:
            raise FrankensteinError(f"in_features={in_features}; exact integer sums allow at most {MAX_IN_FEATURES}")
        self.in_features, self.out_features = in_features, out_features
        self.multiply: Callable[[Tensor, Tensor], Tensor] = backend.multiply
        self.backend = backend.name
        self.register_buffer("qweight", torch.zeros(out_features, packed_width(in_features), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(out_features if scale == "channel" else 1))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("norm_weight", torch.zeros(in_features) if norm else None)
        self.register_buffer("codes", torch.zeros(0, in_features, dtype=torch.int8), persistent=False)

    @classmethod
    def like(cls, layer: BitLinear, backend: Backend) -> "PackedTernaryLinear":
        """An empty packed layer with the settings of `layer`."""
        bias, norm = layer.bias is not None, layer.norm is not None
        return cls(layer.in_features, layer.out_features, bias=bias, scale=layer.scale, norm=norm, backend=backend)

    @classmethod
    def from_bitlinear(cls, layer: BitLinear, backend: Backend) -> "PackedTernaryLinear":
        """The packed form of a trained layer."""
        packed = cls.like(layer, backend)
        codes, scale = ternary_quantize(layer.weight, per_channel=layer.scale == "channel")
        packed.qweight, packed.scale = pack_rows(codes), scale.reshape(-1).float()
        packed.bias = None if layer.bias is None else layer.bias.detach().float().clone()
        packed.norm_weight = None if layer.norm is None else layer.norm.weight.detach().float().clone()
        packed.unpack()
        return packed

    def unpack(self) -> None:
        """Decode and check the packed weights; needed once, after the tensors were loaded."""
        self.codes = unpack_rows(self.qweight, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.norm_weight is not None:
            x = rms_norm(x, self.norm_weight, NORM_EPS)
        x_codes, x_scale = activation_codes(x)
        rows = x_codes.reshape(-1, self.in_features).to(torch.int8)
        product = self.multiply(rows, self.codes).to(torch.float32).view(*x.shape[:-1], self.out_features)
        return rescale(product, x_scale, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, backend={self.backend}"


def set_backend(module: nn.Module, backend: Backend) -> None:
    """Let every packed layer of `module` multiply with `backend`."""
    for layer in module.modules():
        if isinstance(layer, PackedTernaryLinear):
            layer.multiply, layer.backend = backend.multiply, backend.name
