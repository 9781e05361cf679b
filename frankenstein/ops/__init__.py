"""The operators' public face: pure functions of tensors, on which mixers, norms and ternary layers are built."""

from frankenstein.mixers.bigbird import bigbird_mask
from frankenstein.mixers.contextual_agreement import dominant_chunks
from frankenstein.mixers.delta_rule import (
    bidirectional_delta_rule,
    bidirectional_gated_delta_rule,
    delta_rule,
    gated_delta_rule,
)
from frankenstein.mixers.fasa import fasa
from frankenstein.mixers.fox import bidirectional_forgetting_attn, forgetting_attn
from frankenstein.mixers.gated_softmax_attn import gated_softmax_attention
from frankenstein.mixers.gla import bidirectional_gla, gla
from frankenstein.mixers.griffin import bidirectional_rg_lru, rg_lru
from frankenstein.mixers.hgrn2 import bidirectional_hgrn2, hgrn2, hgrn2_lower_bounds
from frankenstein.mixers.hope import hope_scores
from frankenstein.mixers.kda import bidirectional_kda, kda
from frankenstein.mixers.longformer import longformer_mask
from frankenstein.mixers.mla_attn import mla_absorbed, mla_attention
from frankenstein.mixers.nsa import nsa, nsa_bidirectional
from frankenstein.mixers.ode import ode_solve
from frankenstein.mixers.retnet import bidirectional_retention, retention, retention_decay
from frankenstein.mixers.selective_scan import bidirectional_selective_scan, selective_scan
from frankenstein.mixers.sigmoid_attn import sigmoid_attention
from frankenstein.mixers.simple_gla import bidirectional_simple_gla, simple_gla
from frankenstein.mixers.sparge import sparge_attention, sparge_block_map
from frankenstein.mixers.sparse_transformer import sparse_transformer_mask
from frankenstein.mixers.sparsek_projection import sparsek
from frankenstein.mixers.standard_attn import softmax_attention
from frankenstein.mixers.titans_memory import bidirectional_titans_memory, titans_memory
from frankenstein.model.norms import derf, dyt, rms_norm
from frankenstein.quantization.bitlinear import activation_quantize, bitlinear, ternary_pack, ternary_quantize

__all__ = [
    "activation_quantize",
    "bidirectional_delta_rule",
    "bidirectional_forgetting_attn",
    "bidirectional_gated_delta_rule",
    "bidirectional_gla",
    "bidirectional_hgrn2",
    "bidirectional_kda",
    "bidirectional_retention",
    "bidirectional_rg_lru",
    "bidirectional_selective_scan",
    "bidirectional_simple_gla",
    "bidirectional_titans_memory",
    "bigbird_mask",
    "bitlinear",
    "delta_rule",
    "derf",
    "dominant_chunks",
    "dyt",
    "fasa",
    "forgetting_attn",
    "gated_delta_rule",
    "gated_softmax_attention",
    "gla",
    "hgrn2",
    "hgrn2_lower_bounds",
    "hope_scores",
    "kda",
    "longformer_mask",
    "mla_absorbed",
    "mla_attention",
    "nsa",
    "nsa_bidirectional",
    "ode_solve",
    "retention",
    "retention_decay",
    "rg_lru",
    "rms_norm",
    "selective_scan",
    "sigmoid_attention",
    "simple_gla",
    "softmax_attention",
    "sparge_attention",
    "sparge_block_map",
    "sparse_transformer_mask",
    "sparsek",
    "ternary_pack",
    "ternary_quantize",
    "titans_memory",
]
