"""Options of the ternary finish."""

from dataclasses import dataclass

from frankenstein.options import option


@dataclass(frozen=True)
class QuantizeOptions:
    """Turning the pretrained encoder ternary."""

    weights: str = option(
        "ternary",
        "ternary packs to 2 bits a weight; none keeps the encoder in full precision.",
        enum=["ternary", "none"],
    )
    scale: str = option(
        "channel", "One scale a tensor (BitNet b1.58) or one an output channel.", enum=["tensor", "channel"]
    )
    embeddings: str = option(
        "int8",
        "Storage of the embedding table; ternary trains it so in the finish. One pretrained ternary stays ternary.",
        enum=["int8", "float32", "ternary"],
    )
    steps: int = option(
        80, "Quantization-aware finishing steps of a full-precision encoder; 0 packs it as it is.", minimum=0
    )
    warmup_fraction: float = option(
        0.2,
        "Share of the finishing steps over which quantization is phased in, weights first.",
        minimum=0.0,
        maximum=1.0,
    )
    lr: float = option(1e-3, "Peak learning rate of the finish (AdamW, cosine to zero).", exclusiveMinimum=0.0)
    distillation_weight: float = option(
        0.5,
        "Weight of the divergence from the encoder's own full-precision parent; 0 trains on labels only.",
        minimum=0.0,
        maximum=1.0,
    )
    backend: str = option(
        "auto",
        "Integer backend of the packed model; auto takes the fastest that this machine has.",
        enum=["auto", "int_mm", "onednn", "reference"],
    )
