"""The packed layers and their integer backends. No float master of a ternary weight exists here.

Every backend multiplies int8 codes into int32 sums, so all are equal bit for bit; `reference` is the oracle. A packed
layer keeps its 2-bit weights and, for the matrix product, their int8 codes.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.quantization.bitlinear import NORM_EPS, BitLinear, normed_codes, rescale, ternary_quantize
from frankenstein.quantization.packing import pack_rows, packed_width, unpack_rows

log = logging.getLogger(__name__)

# |sum| <= 127 in_features must stay below 2^24, where float32 still holds every integer.
MAX_IN_FEATURES = (2**24 - 1) // 127


@dataclass(frozen=True)
class Backend:
    """One way to multiply codes.

    multiply: (M, K) int8, prepared weight -> (M, N) integers, as int32 or as float32 that holds them exactly.
    prepare: codes (N, K) int8 -> what `multiply` reads; done once a layer.
    """

    name: str
    multiply: Callable[[Tensor, Any], Tensor]
    prepare: Callable[[Tensor], Any] = lambda codes: codes


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


@dataclass(frozen=True)
class _OneDnnWeight:
    """A weight in oneDNN's own layout, with scales of 1."""

    blocks: Tensor
    ones: Tensor
    zeros: Tensor


def _prepare_onednn(codes: Tensor) -> _OneDnnWeight:
    columns = codes.shape[0]
    blocks = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    return _OneDnnWeight(blocks, torch.ones(columns), torch.zeros(columns, dtype=torch.int64))


def _multiply_onednn(x: Tensor, weight: _OneDnnWeight) -> Tensor:
    """int8 products with int32 sums, handed over as float32."""
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 0, weight.blocks, weight.ones, weight.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


BACKENDS = {
    b.name: b
    for b in (
        Backend("int_mm", _multiply_int_mm),
        Backend("onednn", _multiply_onednn, _prepare_onednn),
        Backend("reference", _multiply_reference),
    )
}
_TRIAL = (512, 256, 256)  # M, K, N of the product that the automatic choice times


def choose_backend(name: str = "auto", device: torch.device | str = "cpu") -> Backend:
    """The backend of this name; "auto" takes the fastest of those that work here, by a short trial.

    Raises: FrankensteinError: for an unknown name, or one that does not work on `device`.
    """
    if name == "auto":
        return _fastest(str(device))
    if name not in BACKENDS:
        raise FrankensteinError(f"unknown ternary backend {name!r}; known: auto, {', '.join(sorted(BACKENDS))}")
    if name != "reference" and not _works(BACKENDS[name], device):
        raise FrankensteinError(f"ternary backend {name!r} does not work on {device}; use auto or reference")
    return BACKENDS[name]


@cache
def _fastest(device: str) -> Backend:
    working = [b for b in BACKENDS.values() if b.name == "reference" or _works(b, device)]
    seconds = {b.name: _trial_seconds(b, device) for b in working if len(working) > 1}
    chosen = min(working, key=lambda b: seconds.get(b.name, 0.0))
    shown = ", ".join(f"{b} {1e3 * s:.2f} ms" for b, s in seconds.items())
    log.info("ternary backend: %s (automatic; %s)", chosen.name, shown or "the only one")
    return chosen


def _trial_seconds(backend: Backend, device: str) -> float:
    """Best time of four products; the first warms up."""
    m, k, n = _TRIAL
    x = torch.ones(m, k, dtype=torch.int8, device=device)
    weight = backend.prepare(torch.ones(n, k, dtype=torch.int8, device=device))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        backend.multiply(x, weight)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best


def _works(backend: Backend, device: torch.device | str) -> bool:
    """Whether the backend gives the oracle's integers on this device: one row, odd sizes, the largest sums."""
    generator = torch.Generator().manual_seed(0)
    trials = []
    for m, k, n in ((1, 16, 8), (5, 33, 7), (32, 64, 24)):
        x = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
        trials.append((x, torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=generator)))
    largest = torch.full((3, 520), 127, dtype=torch.int8)  # integer kernels that add in 16 bits would saturate here
    trials += [(largest, torch.ones(5, 520, dtype=torch.int8)), (largest, -torch.ones(5, 520, dtype=torch.int8))]
    for x, weight in trials:
        try:
            got = backend.multiply(x.to(device), backend.prepare(weight.to(device)))
        except (RuntimeError, AttributeError) as error:
            log.info("ternary backend %s is not available: %s", backend.name, str(error).split("\n")[0])
            return False
        if not torch.equal(got.cpu().double(), _multiply_reference(x, weight).double()):
            log.warning("ternary backend %s computes wrong integers on %s and is not used", backend.name, device)
            return False
    return True


@dataclass
class _Prepared:
    """A layer's weight as its backend wants it, made at the first product; a copied layer makes its own."""

    weight: Any = None
    made_of: Tensor | None = field(default=None, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Prepared":
        return _Prepared()


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
        self.use(backend)
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

    def use(self, backend: Backend) -> None:
        """Multiply with this backend from now on."""
        self.backend, self._chosen, self._prepared = backend.name, backend, _Prepared()

    def _multiply(self, rows: Tensor) -> Tensor:
        if self._prepared.made_of is not self.codes:  # first use, other weights, or moved to another device
            self._prepared = _Prepared(self._chosen.prepare(self.codes), self.codes)
        return self._chosen.multiply(rows, self._prepared.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x_codes, x_scale = normed_codes(x, self.norm_weight, NORM_EPS)
        rows = x_codes.reshape(-1, self.in_features).to(torch.int8)
        product = self._multiply(rows).to(torch.float32).view(*x.shape[:-1], self.out_features)
        return rescale(product, x_scale, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, backend={self.backend}"


def set_backend(module: nn.Module, backend: Backend) -> None:
    """Let every packed layer of `module` multiply with `backend`."""
    for layer in module.modules():
        if isinstance(layer, PackedTernaryLinear):
            layer.use(backend)
