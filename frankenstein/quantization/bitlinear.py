"""Ternary linear layers: the one arithmetic that training, packing and every runtime backend share.

    s_x = max(max|x|, 1e-5) / 127     c_x = round(x / s_x)                 int8, one scale a token
    s_w = max(mean|W|, 1e-5)          c_w = clip(round(W / s_w), -1, 1)    ternary, one scale a tensor or output channel
    y   = ((c_x c_w^T) s_x) s_w + b                                        in this order

Rounding is half to even. The product of the codes sums integers below 2^24, so float32 holds it exactly in any order of
summation: the training forward, int32 arithmetic and the packed model give the same bits.
Source: Ma et al. 2024 (BitNet b1.58), eq. 1-3, https://arxiv.org/abs/2402.17764; seed 002, eq. 35-37, algorithm 3 (its
eq. 34 has another threshold than its eq. 35). Where we differ: the default is one scale an output channel, which costs
nothing at inference and absorbs the spread between rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError
from frankenstein.kernels import rows
from frankenstein.kernels.rms_norm import RMSNorm, norm_gradients, rms_norm
from frankenstein.runtime import product_dtype

SCALE_FLOOR = 1e-5
NORM_EPS = 1e-6
SCALES = ("channel", "tensor")
KERNEL_TYPES = (torch.float32, torch.bfloat16)  # that the C kernels write codes in


def activation_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of every row, still in the dtype of x, and their scales. x: (..., D). Returns: (..., D), (..., 1)."""
    if rows.usable(x):
        return rows.quantize(x, None, 0.0)[:2]
    largest = x.abs().amax(-1, keepdim=True).clamp_min_(SCALE_FLOOR)
    # A tensor divisor: CUDA turns division by a Python number into a product with its reciprocal: other bits.
    scale = largest.div_(torch.full((), 127.0, dtype=x.dtype, device=x.device))
    # |x| <= largest, so the quotient never rounds beyond 127 and needs no clipping.
    return (x / scale).round_(), scale


def normed_codes(x: Tensor, norm_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`activation_codes` of the RMS norm of x (..., D) by norm_weight (D,), or of x itself."""
    if norm_weight is None:
        return activation_codes(x)
    if rows.usable(x, norm_weight):
        return rows.quantize(x, norm_weight, eps)[:2]
    return activation_codes(rms_norm(x, norm_weight, eps))


def ternary_codes(weight: Tensor, per_channel: bool, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Codes -1, 0, 1 of weight (out, in) in `dtype` (None: its own), and their scale: (1,), or (out,) per channel."""
    dtype = weight.dtype if dtype is None else dtype
    if per_channel and dtype in KERNEL_TYPES and rows.usable(weight):
        return rows.ternarize(weight, dtype)
    magnitude = weight.abs()
    scale = magnitude.mean(1) if per_channel else magnitude.mean().reshape(1)
    scale = scale.clamp_min_(SCALE_FLOOR)
    return (weight / scale[:, None]).round_().clamp_(-1, 1).to(dtype), scale


def rescale(product: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """((product * x_scale) * weight_scale) + bias, in place where the dtypes are one; half types are rounded once.

    Args: product: (..., out); x_scale: (..., 1); weight_scale: (1,) or (out,); bias: (out,).
    """
    if rows.usable(product, half=True) and rows.usable(x_scale, weight_scale):
        rows.rescale(product, x_scale, weight_scale)
    elif product.dtype == x_scale.dtype:
        product.mul_(x_scale).mul_(weight_scale)
    else:
        product = (product * x_scale).mul_(weight_scale).to(product.dtype)
    return product if bias is None else product.add_(bias)


def activation_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax int8 quantization of every row: x ~ codes * scale.

    Args: x: (..., D).
    Returns: codes (..., D) int8 in -127..127; scale (..., 1) in the dtype of x.
    Source: Ma et al. 2024, https://arxiv.org/abs/2402.17764.
    """
    codes, scale = activation_codes(x.detach())
    return codes.to(torch.int8), scale


def ternary_quantize(weight: Tensor, *, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """Absmean ternary quantization: weight ~ codes * scale.

    Args: weight: (out, in); per_channel: one scale an output channel instead of one for the tensor.
    Returns: codes (out, in) int8 in -1, 0, 1; scale () or (out, 1), in the dtype of weight.
    Source: Ma et al. 2024, eq. 1-3, https://arxiv.org/abs/2402.17764.
    """
    codes, scale = ternary_codes(weight.detach(), per_channel)
    return codes.to(torch.int8), scale[:, None] if per_channel else scale[0]


class _TernaryLinear(torch.autograd.Function):
    """Product of the quantized input and weight; the gradient passes both roundings as if they were the identity.

    Under autocast all products, here and in the backward pass, take its type; the codes are exact in it.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        per_channel: bool,
        norm_weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        dtype = product_dtype(x)
        if rows.usable(x, half=True) and dtype in KERNEL_TYPES:
            x_codes, x_scale, inverse = rows.quantize(x, norm_weight, eps, dtype)
        else:
            (x_codes, x_scale), inverse = activation_codes(x), None
            x_codes = x_codes.to(dtype)
        if dtype == torch.float16:  # whose largest number a sum of 516 codes can reach
            x_codes, x_scale = x_codes / 128, x_scale * 128
        w_codes, w_scale = ternary_codes(weight, per_channel, dtype)
        normed = () if norm_weight is None else (x, norm_weight, inverse)
        ctx.save_for_backward(x_codes, x_scale, w_codes, w_scale, *normed)
        ctx.dtypes, ctx.eps = (x.dtype, weight.dtype), eps
        return rescale(F.linear(x_codes, w_codes), x_scale, w_scale, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        x_codes, x_scale, w_codes, w_scale, *normed = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_x = grad_weight = grad_norm = None
        grad_bias = flat.sum(0, dtype=ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
                grad_x = grad @ _values(w_codes, w_scale.expand(len(w_codes))[:, None]).to(grad.dtype)
            if ctx.needs_input_grad[1]:
                values = _values(x_codes, x_scale).to(grad.dtype)
                grad_weight = (flat.T @ values.flatten(0, -2)).to(ctx.dtypes[1])
            if normed and grad_x is not None:
                x, norm_weight, inverse = normed
                grad_x, grad_norm = norm_gradients(grad_x, x, norm_weight, inverse, ctx.eps, ctx.needs_input_grad[4])
        return None if grad_x is None else grad_x.to(ctx.dtypes[0]), grad_weight, grad_bias, None, grad_norm, None


def _values(codes: Tensor, scale: Tensor) -> Tensor:
    """codes (..., D) times the scale of their row, (..., 1)."""
    return rows.dequantize(codes, scale) if rows.usable(codes, half=True) and rows.usable(scale) else codes * scale


def ternary_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    per_channel: bool = False,
    norm_weight: Tensor | None = None,
    eps: float = NORM_EPS,
) -> Tensor:
    """Linear layer on int8 activations and ternary weights, with straight-through gradients.

    Args: x: (..., in); weight: (out, in); bias: (out,); norm_weight: (in,), of an RMS norm before it.
    Returns: (..., out), in the type of autocast where that is on; else half types are computed and returned in float32.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    autocast = torch.is_autocast_enabled(x.device.type)
    kept = rows.usable(x, half=True) and autocast and product_dtype(x) == torch.bfloat16  # the kernels read bfloat16
    x = x.float() if half and not kept else x
    if norm_weight is not None and not (kept or rows.usable(x, norm_weight)):
        x, norm_weight = rms_norm(x, norm_weight, eps), None
    y: Tensor = _TernaryLinear.apply(x, weight, bias, per_channel, norm_weight, eps)
    return y


def bitlinear(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = NORM_EPS,
    per_channel: bool = False,
) -> Tensor:
    """RMSNorm, then the linear layer on int8 activations and ternary weights.

    Args: x: (..., in); weight: (out, in); norm_weight: (in,); bias: (out,); per_channel: see `ternary_quantize`.
    Returns: (..., out).
    Source: Ma et al. 2024, https://arxiv.org/abs/2402.17764; seed paper 002, algorithm 3.
    """
    return ternary_linear(x, weight, bias, per_channel=per_channel, norm_weight=norm_weight, eps=eps)


def ternary_pack(codes: Tensor) -> Tensor:
    """Four rows in a byte: row r + i*R goes to bits 2i, 2i+1 of row r as value + 1; absent rows are 0 bits.

    Args: codes: (out, in) int8 in -1, 0, 1.
    Returns: (R, in) uint8 with R = ceil(out / 4).
    Source: BitNet layout of transformers 5.23 (integrations/bitnet.py), https://github.com/huggingface/transformers.
    """
    rows = -(-codes.shape[0] // 4)
    values = codes.new_zeros((4 * rows, codes.shape[1]), dtype=torch.uint8)
    values[: codes.shape[0]] = (codes + 1).to(torch.uint8)
    first, second, third, fourth = values.view(4, rows, codes.shape[1])
    return first | second << 2 | third << 4 | fourth << 6


class Latent(nn.Module):
    """Base of layers whose latent float weights act as ternary ones, to a strength between 0 and 1."""

    lambda_w = lambda_a = 1.0


class BitLinear(Latent):
    """Linear layer whose latent float weights act as ternary ones: (..., in) -> (..., out).

    The strengths phase quantization in: w + lambda_w (q(w) - w), likewise lambda_a for the activations; 0 is the float
    layer, exactly; 1, where both start, is the packed layer, bit for bit.
    Source: Ma et al. 2024, https://arxiv.org/abs/2402.17764; strengths: https://huggingface.co/blog/1_58_llm_extreme_quantization.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, scale: str = "channel", norm: bool = True
    ) -> None:
        super().__init__()
        if scale not in SCALES:
            raise FrankensteinError(f"scale {scale!r}; allowed: {', '.join(SCALES)}")
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        linear = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias = linear.weight, linear.bias
        self.norm = RMSNorm(in_features, NORM_EPS) if norm else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, scale: str = "channel", norm: bool = True) -> "BitLinear":
        """The same parameters (the objects, not copies) under ternary arithmetic."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None, scale=scale, norm=norm)
        layer.weight, layer.bias = linear.weight, linear.bias
        if layer.norm is not None:
            layer.norm.weight = nn.Parameter(linear.weight.detach().new_ones(linear.in_features))
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        per_channel = self.scale == "channel"
        if self.lambda_w == 1.0 and self.lambda_a == 1.0:
            norm_weight = None if self.norm is None else self.norm.weight
            return ternary_linear(x, self.weight, self.bias, per_channel=per_channel, norm_weight=norm_weight)
        if self.norm is not None:
            x = self.norm(x)
        weight = self.weight
        if self.lambda_w > 0.0:
            w_codes, w_scale = ternary_codes(weight.detach(), per_channel)
            weight = weight + self.lambda_w * (w_codes * w_scale[:, None] - weight.detach())
        if self.lambda_a > 0.0:
            x_codes, x_scale = activation_codes(x.detach())
            x = x + self.lambda_a * (x_codes * x_scale - x.detach())
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scale={self.scale}, norm={self.norm is not None}"
        )


def set_strength(module: nn.Module, weights: float, activations: float) -> None:
    """Set how far quantization is phased in, in every ternary layer of `module`: 0 not at all, 1 fully."""
    if not (0.0 <= weights <= 1.0 and 0.0 <= activations <= 1.0):
        raise FrankensteinError(f"quantization strengths {weights}, {activations}; both must lie in 0..1")
    for layer in module.modules():
        if isinstance(layer, Latent):
            layer.lambda_w, layer.lambda_a = weights, activations
