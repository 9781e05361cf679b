"""The operators' public face: pure functions of tensors, on which mixers, norms and ternary layers are built."""

from frankenstein.mixers.gated_softmax_attn import gated_softmax_attention
from frankenstein.mixers.retnet import bidirectional_retention, retention, retention_decay
from frankenstein.mixers.sigmoid_attn import sigmoid_attention
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.model.norms import derf, dyt, rms_norm
from frankenstein.quantization.bitlinear import activation_quantize, bitlinear, ternary_pack, ternary_quantize

__all__ = [
    "activation_quantize",
    "bidirectional_retention",
    "bitlinear",
    "derf",
    "dyt",
    "gated_softmax_attention",
    "retention",
    "retention_decay",
    "rms_norm",
    "sigmoid_attention",
    "softmax_attention",
    "ternary_pack",
    "ternary_quantize",
]
