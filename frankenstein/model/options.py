"""Options of the encoder; those special to one mixer live in its file and are set under `model.mixers.<name>`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from frankenstein.options import option


@dataclass(frozen=True)
class ModelOptions:
    """The encoder: width, depth, mixers, feed-forward, norms, embeddings."""

    vocab_size: int = option(1200, "Vocabulary size; the tokenizer is trained to it.", minimum=1)
    hidden_size: int = option(128, "Hidden width D.", minimum=1)
    num_layers: int = option(2, "Physical layers.", minimum=1)
    num_loops: int = option(
        1, "Times the physical layers are traversed; logical depth is num_layers x num_loops.", minimum=1
    )
    num_heads: int = option(4, "Attention heads.", minimum=1)
    num_kv_heads: int | None = option(
        None, "Key and value heads of grouped-query attention; null means num_heads.", minimum=1
    )
    retention_heads: int = option(4, "Retention heads of RetNet-style mixers.", minimum=1)
    num_experts: int = option(4, "Experts of the mixture-of-experts feed-forward.", minimum=1)
    top_k_experts: int = option(2, "Experts that each token is routed to.", minimum=1)
    expert_capacity_factor: float = option(
        1.25,
        "Room of an expert in training, as a multiple of its even share; tokens beyond it only pass the residual.",
        minimum=1.0,
    )
    expert_balance_weight: float = option(
        0.01, "Weight of the experts' load-balance loss, for each layer.", minimum=0.0
    )
    dropout: float = option(
        0.0, "Dropout on embeddings, mixer outputs and feed-forward outputs.", minimum=0.0, maximum=1.0
    )
    layer_pattern: tuple[str, ...] = option(
        ("retnet", "standard_attn"), "Mixers, one a layer, cycled over the physical layers.", minItems=1
    )
    causal: bool = option(False, "False lets every token see both ways, as an encoder should; true hides the future.")
    positions: str = option("rope", "Position encoding of queries and keys.", enum=["rope", "hope", "none"])
    rope_base: float = option(10000.0, "Base of the rotary angles.", exclusiveMinimum=0.0)
    ode_solver: str = option("rk4", "Solver of the ode mixer.", enum=["rk4", "euler"])
    ode_steps: int = option(2, "Integration steps of the ode mixer.", minimum=1)
    use_bitnet: bool = option(False, "Train with ternary linear layers (BitNet b1.58) from the first step.")
    use_bitnet_embedding: bool = option(
        False, "With use_bitnet: the embedding table is ternary too, one scale a row (seed 002, eq. 17)."
    )
    norm_type: str = option("rms_norm", "Normalization before each sublayer.")
    use_factorized_embedding: bool = option(False, "Factorize the embedding table.")
    factorized_embedding_dim: int = option(64, "Inner width E of the factorized embedding.", minimum=1)
    use_embedding_conv: bool = option(False, "Convolve the embedding stream over time.")
    embedding_conv_kernel: int = option(3, "Kernel size of the embedding convolution, in tokens.", minimum=1)
    use_hope: bool = option(False, "Apply HoPE positions in titan_attn.")
    hope_base: float = option(10000.0, "Base of the HoPE rates.", minimum=0.0)
    hope_damping: float = option(0.0, "Further decay of HoPE, per token of distance.", minimum=0.0)
    use_moe: bool = option(False, "Replace the dense feed-forward by a mixture of experts.")
    ffn_hidden_size: int = option(384, "Inner width F of the feed-forward.", minimum=1)
    ffn_activation: str = option("gelu", "Feed-forward activation (gelu is the exact erf form).", enum=["gelu", "silu"])
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    tie_embeddings: bool = option(True, "Use the embedding table as the output projection of the MLM head.")
    mixers: dict[str, Any] = option({}, "Options special to a mixer, by mixer name.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """(key, message) of every broken rule between fields."""
        yield from self._head_faults("num_heads", self.num_heads, hope=self.positions == "hope" or self.use_hope)
        yield from self._head_faults("retention_heads", self.retention_heads, hope=False)
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            yield "num_kv_heads", f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
        if self.top_k_experts > self.num_experts:
            yield "top_k_experts", f"found {self.top_k_experts}; expected at most num_experts={self.num_experts}"
        if (self.positions == "hope" or self.use_hope) and self.hope_base == 0.0:
            yield "hope_base", "found 0; HoPE needs more than 0"
        if self.use_embedding_conv and not self.causal and self.embedding_conv_kernel % 2 == 0:
            yield (
                "embedding_conv_kernel",
                f"found {self.embedding_conv_kernel}; a centred filter has an odd size (causal: true takes any)",
            )
        if self.use_bitnet_embedding and not self.use_bitnet:
            yield "use_bitnet_embedding", "needs use_bitnet: true"
        if not self.layer_pattern:
            yield "layer_pattern", "found an empty list; expected at least one mixer"

    def _head_faults(self, key: str, heads: int, *, hope: bool) -> Iterator[tuple[str, str]]:
        width, rest = divmod(self.hidden_size, heads)
        if rest:
            yield key, f"hidden_size={self.hidden_size} is not a multiple of {key}={heads}"
        elif width % 2 and (self.positions == "rope" or hope):
            name = "hope" if hope else "rope"
            yield key, f"hidden_size / {key} is {width}; positions: {name} needs an even number of channels a head"
