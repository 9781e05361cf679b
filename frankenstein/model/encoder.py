"""The encoder: embedding, hybrid layers traversed one or more times, final norm, MLM head.

    ids -> embedding -> dropout -> (block_1 .. block_n) x num_loops -> norm -> hidden

Source: seed 002 eq. 16 and algorithm 1.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jsonschema import Draft202012Validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frankenstein.errors import FrankensteinError, NotBuiltYetError
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.mixers.hope import Hope
from frankenstein.model.block import Block
from frankenstein.model.embeddings import EmbeddingStream
from frankenstein.model.feed_forward import FeedForward
from frankenstein.model.head import MlmHead
from frankenstein.model.moe import MixtureOfExperts, Routing
from frankenstein.model.norms import NORMS
from frankenstein.model.options import ModelOptions
from frankenstein.model.positions import Rotary
from frankenstein.options import build, plain
from frankenstein.params import Params
from frankenstein.registry import nearest

INIT_STD = 0.02


@dataclass
class _LastPass:
    """What the traversals of the last forward pass left behind; a copied encoder starts without it."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    routings: list[Routing] = field(default_factory=list)

    def add(self, block: Block) -> None:
        """Called after each traversal: a looped block counts as often as it was run."""
        for name, value in block.losses().items():
            self.losses[name] = self.losses[name] + value if name in self.losses else value
        if isinstance(block.ffn, MixtureOfExperts) and block.ffn.routing is not None:
            self.routings.append(block.ffn.routing)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_LastPass":
        return _LastPass()


class Encoder(nn.Module):
    """Bidirectional token encoder made of the mixers that the options name.

    Args:
        options: the encoder's shape.
        vocab_size: rows of the embedding; None takes it from the options.
        max_length: tokens in a pretraining row; longer inputs work.
    Raises:
        FrankensteinError: if the options contradict each other or name an unknown mixer, norm or mixer option.
        NotBuiltYetError: if they ask for something this version does not have.
    """

    def __init__(self, options: ModelOptions, vocab_size: int | None = None, max_length: int = 512) -> None:
        super().__init__()
        _check(options)
        width = options.hidden_size
        self.options, self.max_length = options, max_length
        self.vocab_size = options.vocab_size if vocab_size is None else vocab_size
        self.embedding_stream = EmbeddingStream(options)
        self.embedding = nn.Embedding(self.vocab_size, self.embedding_stream.table_width or width)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(_blocks(options, max_length))
        self.final_norm = NORMS[options.norm_type](width)
        self.head = MlmHead(self.vocab_size, width, options.tie_embeddings)
        self._last_pass = _LastPass()
        self._initialize()

    def _initialize(self) -> None:
        """Normal weights; those that write to the residual stream are divided by sqrt(2 x logical depth).

        Source: Radford et al. 2019 (GPT-2), section 2.3,
        https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
        """
        nn.init.normal_(self.embedding.weight, std=self.embedding_stream.table_std or INIT_STD)
        residual = INIT_STD / math.sqrt(2 * len(self.blocks) * self.options.num_loops)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual if name.endswith(".out") else INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.embedding_stream.initialize()
        for block in self.blocks:
            block.mixer.initialize()  # type: ignore[operator,union-attr]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Hidden vectors of every token, or of chosen ones.

        Args:
            input_ids: (B, T) integers.
            attention_mask: (B, T), nonzero for real tokens, in any place; None means that all are real.
            at: (N,) positions of real tokens in the flattened (B, T). What only the others need is not computed.
        Returns:  (B, T, D), exactly 0 where the mask is 0, or (N, D) of the tokens at `at`. What stands at padded
            positions never matters.
        """
        if attention_mask is None:
            return self._encode(input_ids, None, at)
        if attention_mask.shape != input_ids.shape:
            raise FrankensteinError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; "
                f"expected that of input_ids, {tuple(input_ids.shape)}"
            )
        mask = attention_mask.bool()
        if mask.all():
            return self._encode(input_ids, None, at)
        # Real tokens first, then only as many columns as the longest row has; padded columns are never computed.
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        order = order[:, : max(int(mask.sum(1).max()), 1)]
        real = mask.gather(1, order)
        if at is not None:
            columns = (mask.cumsum(1) - 1).flatten().index_select(0, at)
            return self._encode(input_ids.gather(1, order), real, at // mask.shape[1] * order.shape[1] + columns)
        hidden = self._encode(input_ids.gather(1, order), real).masked_fill(~real[..., None], 0.0)
        out = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
        return out.scatter(1, order[..., None].expand_as(hidden), hidden)

    def _encode(self, input_ids: Tensor, real: Tensor | None, at: Tensor | None = None) -> Tensor:
        """(B, T) ids, real tokens first, to (B, T, D), or to (N, D) at chosen positions."""
        if real is not None:
            # A row without any real token keeps its first column, which the caller drops: no mixer meets an empty row.
            real = None if real.all() else real | (torch.arange(real.shape[1], device=real.device) == 0)
        x = self.dropout(self.embedding_stream(self.embedding(input_ids), real))
        recompute = self.options.gradient_checkpointing and self.training and torch.is_grad_enabled()
        self._last_pass = _LastPass()
        for index in range(self.options.num_loops * len(self.blocks)):
            block = self.blocks[index % len(self.blocks)]
            wanted = at if index == self.options.num_loops * len(self.blocks) - 1 else None
            arguments = (x, real, index, wanted)
            x = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
            self._last_pass.add(block)  # type: ignore[arg-type]
        return self.final_norm(x)

    def mlm_logits(self, rows: Tensor) -> Tensor:
        """Token logits (n, vocab_size) of chosen hidden rows (n, D)."""
        if not self.options.tie_embeddings:
            return self.head(rows)
        return self.head(self.embedding_stream.to_table(rows), self.embedding.weight)

    def parameter_count(self) -> dict[str, int]:
        """Number of parameters by part: embedding, mixers, ffn, norms, head, total."""
        counts = dict.fromkeys(("embedding", "mixers", "ffn", "norms", "head"), 0)
        for name, parameter in self.named_parameters():
            counts[_part(name)] += parameter.numel()
        return {**counts, "total": sum(counts.values())}

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward pass, by name, summed over the traversals of layers that have them."""
        return dict(self._last_pass.losses)

    def expert_stats(self) -> dict[str, Tensor]:
        """How the last forward pass used its experts; empty without a mixture of experts.

        Returns:  by traversed layer (L = num_layers x num_loops): importance (L, N), mean probability of each expert;
            load (L, N), its share of the assignments; dropped (L,), share of assignments beyond capacity.
        """
        routings = self._last_pass.routings
        names = ("importance", "load", "dropped") if routings else ()
        return {name: torch.stack([getattr(routing, name) for routing in routings]) for name in names}


def build_encoder(params: Params) -> Encoder:
    """The encoder of a configuration, in full precision, with weights drawn from `params.seed`.

    The global random state stays as it was. `model.use_bitnet` is applied by `quantization.convert_to_bitlinear`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        return Encoder(params.model, max_length=params.training.max_length)


def _blocks(options: ModelOptions, max_length: int) -> list[Block]:
    norm, width = NORMS[options.norm_type], options.hidden_size
    rotary, hope = Rotary(options.rope_base), Hope(options.hope_base, options.hope_damping)
    blocks: list[Block] = []
    pattern = _pattern(options)
    built: dict[type[Mixer], list[Mixer]] = {MIXERS[name]: [] for name in pattern}
    for index, name in enumerate(pattern):
        cls = MIXERS[name]
        same = built[cls]
        hyperbolic = options.positions == "hope" or (options.use_hope and cls.takes_use_hope)
        context = MixerContext(
            hidden_size=width,
            num_heads=options.num_heads,
            retention_heads=options.retention_heads,
            dropout=options.dropout,
            causal=options.causal,
            max_length=max_length,
            layer_index=index,
            rotary=rotary if options.positions == "rope" and not hyperbolic else None,
            num_kv_heads=options.num_kv_heads,
            earlier=tuple(same),
            num_same=sum(MIXERS[other] is cls for other in pattern),
            norm=norm,
            ode_solver=options.ode_solver,
            ode_steps=options.ode_steps,
            scores=hope if hyperbolic else None,
        )
        mixer = cls(context, _mixer_options(name, options.mixers.get(name, {})))
        same.append(mixer)
        blocks.append(Block(norm(width), mixer, norm(width), _feed_forward(options), options.dropout))
    return blocks


def _pattern(options: ModelOptions) -> list[str]:
    """The mixer of every physical layer."""
    return [options.layer_pattern[i % len(options.layer_pattern)] for i in range(options.num_layers)]


def _feed_forward(options: ModelOptions) -> FeedForward | MixtureOfExperts:
    if options.use_moe:
        return MixtureOfExperts(options)
    return FeedForward(options.hidden_size, options.ffn_hidden_size, options.ffn_activation)


def _mixer_options(name: str, values: dict[str, Any]) -> Any:
    cls = MIXERS[name].Options
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            listing = ", ".join(known) or "none"
            raise FrankensteinError(f"model.mixers.{name}.{key}: unknown option; known: {listing}{nearest(key, known)}")
    return build(cls, values)


def _check(options: ModelOptions) -> None:
    for key, message in options.faults():
        raise FrankensteinError(f"model.{key}: {message}")
    for entry in dataclasses.fields(options):
        refused, value = entry.metadata["not_built"], plain(getattr(options, entry.name))
        if refused is not None and Draft202012Validator(refused).is_valid(value):
            raise NotBuiltYetError(f"model.{entry.name}: {value!r} is not built yet in this version")
    for name in options.mixers:
        MIXERS[name]  # unknown names raise here, also those that the pattern does not use
    _check_positions(options)


def _check_positions(options: ModelOptions) -> None:
    """HoPE replaces the dot products of queries and keys, which only some mixers have."""
    pattern = _pattern(options)
    refusing = sorted({name for name in pattern if options.positions not in MIXERS[name].positions})
    if refusing:
        known = ", ".join(name for name in MIXERS if options.positions in MIXERS[name].positions)
        raise FrankensteinError(
            f"model.positions: {options.positions} does not work in {', '.join(refusing)} of the layer_pattern; "
            f"it works in {known}"
        )
    if options.use_hope and not any(MIXERS[name].takes_use_hope for name in pattern):
        known = ", ".join(name for name in MIXERS if MIXERS[name].takes_use_hope) or "titan_attn"
        raise FrankensteinError(f"model.use_hope: needs {known} in the layer_pattern; found {', '.join(pattern)}")


def _part(name: str) -> str:
    """The part of the encoder that a parameter belongs to."""
    first, *rest = name.split(".")
    if first == "blocks":
        return {"mixer": "mixers", "ffn": "ffn"}.get(rest[1], "norms")
    return {"final_norm": "norms", "embedding_stream": "embedding"}.get(first, first)
