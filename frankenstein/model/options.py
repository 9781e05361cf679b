"""Options of the encoder; those special to one mixer live in its file and are set under `model.mixers.<name>`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from frankenstein.options import option

_TRUE = {"const": True}


@dataclass(frozen=True)
class ModelOptions:
    """The encoder: width, depth, mixers, feed-forward, norms, embeddings."""

    vocab_size: int = option(1200, "Vocabulary size; the tokenizer is trained to it.", minimum=1)
    hidden_size: int = option(128, "Hidden width D.", minimum=1)
    num_layers: int = option(4, "Physical layers.", minimum=1)
    num_loops: int = option(
        1, "Times the physical layers are traversed; logical depth is num_layers x num_loops.", minimum=1
    )
    num_heads: int = option(4, "Attention heads.", minimum=1)
    num_kv_heads: int | None = option(
        None,
        "Key and value heads of grouped-query attention; null means num_heads.",
        minimum=1,
        not_built={"type": "integer"},
    )
    retention_heads: int = option(4, "Retention heads of RetNet-style mixers.", minimum=1)
    num_experts: int = option(4, "Experts of the mixture-of-experts feed-forward.", minimum=1)
    top_k_experts: int = option(2, "Experts that each token is routed to.", minimum=1)
    dropout: float = option(
        0.0, "Dropout on embeddings, mixer outputs and feed-forward outputs.", minimum=0.0, maximum=1.0
    )
    layer_pattern: tuple[str, ...] = option(
        ("retnet", "standard_attn"), "Mixers, one a layer, cycled over the physical layers.", minItems=1
    )
    causal: bool = option(False, "False lets every token see both ways, as an encoder should; true hides the future.")
    positions: str = option(
        "rope", "Position encoding of queries and keys.", enum=["rope", "hope", "none"], not_built={"const": "hope"}
    )
    rope_base: float = option(10000.0, "Base of the rotary angles.", exclusiveMinimum=0.0)
    ode_solver: str = option("rk4", "Solver of the ode mixer.", enum=["rk4", "euler"])
    ode_steps: int = option(2, "Integration steps of the ode mixer.", minimum=1)
    use_bitnet: bool = option(False, "Train with ternary linear layers (BitNet b1.58) from the first step.")
    norm_type: str = option("rms_norm", "Normalization before each sublayer.")
    use_factorized_embedding: bool = option(False, "Factorize the embedding table.", not_built=_TRUE)
    factorized_embedding_dim: int = option(64, "Inner width of the factorized embedding.", minimum=1)
    use_embedding_conv: bool = option(False, "Convolve the embedding stream over time.", not_built=_TRUE)
    embedding_conv_kernel: int = option(3, "Kernel size of the embedding convolution, in tokens.", minimum=1)
    use_hope: bool = option(False, "Apply HoPE positions in titan_attn.", not_built=_TRUE)
    hope_base: float = option(10000.0, "HoPE base.", minimum=0.0)
    hope_damping: float = option(0.0, "HoPE damping.", minimum=0.0)
    use_moe: bool = option(False, "Replace the dense feed-forward by a mixture of experts.", not_built=_TRUE)
    ffn_hidden_size: int = option(384, "Inner width F of the feed-forward.", minimum=1)
    ffn_activation: str = option("gelu", "Feed-forward activation (gelu is the exact erf form).", enum=["gelu", "silu"])
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", not_built=_TRUE
    )
    tie_embeddings: bool = option(True, "Use the embedding table as the output projection of the MLM head.")
    mixers: dict[str, Any] = option({}, "Options special to a mixer, by mixer name.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, message) of every broken rule between fields."""
        for key, heads in (("num_heads", self.num_heads), ("retention_heads", self.retention_heads)):
            width, rest = divmod(self.hidden_size, heads)
            if rest:
                yield key, f"hidden_size={self.hidden_size} is not a multiple of {key}={heads}"
            elif self.positions == "rope" and width % 2:
                yield key, f"hidden_size / {key} is {width}; positions: rope needs an even number of channels a head"
        if self.top_k_experts > self.num_experts:
            yield "top_k_experts", f"found {self.top_k_experts}; expected at most num_experts={self.num_experts}"
        if not self.layer_pattern:
            yield "layer_pattern", "found an empty list; expected at least one mixer"
