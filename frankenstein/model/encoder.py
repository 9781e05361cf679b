"""The encoder: embedding, hybrid layers traversed one or more times, final norm, MLM head.

    ids -> embedding -> dropout -> (block_1 .. block_n) x num_loops -> norm -> hidden

Source: seed 002 eq. 16 and algorithm 1.
"""

import dataclasses
import math
from typing import Any

import torch
from jsonschema import Draft202012Validator
from torch import Tensor, nn

from frankenstein.errors import FrankensteinError, NotBuiltYetError
from frankenstein.mixers.base import MIXERS, Mixer, MixerContext
from frankenstein.model.block import Block
from frankenstein.model.feed_forward import FeedForward
from frankenstein.model.head import MlmHead
from frankenstein.model.norms import NORMS
from frankenstein.model.options import ModelOptions
from frankenstein.model.positions import Rotary
from frankenstein.options import build, plain
from frankenstein.params import Params
from frankenstein.registry import nearest

INIT_STD = 0.02


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
        self.embedding = nn.Embedding(self.vocab_size, width)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(_blocks(options, max_length))
        self.final_norm = NORMS[options.norm_type](width)
        self.head = MlmHead(self.vocab_size, width, options.tie_embeddings)
        self._initialize()

    def _initialize(self) -> None:
        """Normal weights; those that write to the residual stream are divided by sqrt(2 x logical depth).

        Source: Radford et al. 2019 (GPT-2), section 2.3,
        https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
        """
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        residual = INIT_STD / math.sqrt(2 * len(self.blocks) * self.options.num_loops)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual if name.endswith(".out") else INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for mixer in self._mixers():
            mixer.initialize()

    def _mixers(self) -> list[Mixer]:
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden vectors of every token.

        Args:
            input_ids: (B, T) integers.
            attention_mask: (B, T), nonzero for real tokens, in any place; None means that all are real.
        Returns:  (B, T, D), exactly 0 where the mask is 0. What stands at padded positions never matters.
        """
        if attention_mask is None:
            return self._encode(input_ids, None)
        if attention_mask.shape != input_ids.shape:
            raise FrankensteinError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; "
                f"expected that of input_ids, {tuple(input_ids.shape)}"
            )
        mask = attention_mask.bool()
        if mask.all():
            return self._encode(input_ids, None)
        # Real tokens first, then only as many columns as the longest row has; padded columns are never computed.
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        order = order[:, : max(int(mask.sum(1).max()), 1)]
        real = mask.gather(1, order)
        hidden = self._encode(input_ids.gather(1, order), real).masked_fill(~real[..., None], 0.0)
        out = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
        return out.scatter(1, order[..., None].expand_as(hidden), hidden)

    def _encode(self, input_ids: Tensor, real: Tensor | None) -> Tensor:
        """(B, T) ids, real tokens first, to (B, T, D)."""
        if real is not None:
            # A row without any real token keeps its first column, which the caller drops: no mixer meets an empty row.
            real = None if real.all() else real | (torch.arange(real.shape[1], device=real.device) == 0)
        x = self.dropout(self.embedding(input_ids))
        for loop in range(self.options.num_loops):
            for index, block in enumerate(self.blocks, loop * len(self.blocks)):
                x = block(x, real, index)
        return self.final_norm(x)

    def mlm_logits(self, rows: Tensor) -> Tensor:
        """Token logits (n, vocab_size) of chosen hidden rows (n, D)."""
        return self.head(rows, self.embedding.weight)

    def parameter_count(self) -> dict[str, int]:
        """Number of parameters by part: embedding, mixers, ffn, norms, head, total."""
        counts = dict.fromkeys(("embedding", "mixers", "ffn", "norms", "head"), 0)
        for name, parameter in self.named_parameters():
            counts[_part(name)] += parameter.numel()
        return {**counts, "total": sum(counts.values())}

    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward pass, by name, summed over the layers that have them."""
        losses: dict[str, Tensor] = {}
        for mixer in self._mixers():
            for name, value in mixer.losses().items():
                losses[name] = losses[name] + value if name in losses else value
        return losses


def build_encoder(params: Params) -> Encoder:
    """The encoder of a configuration, in full precision, with weights drawn from `params.seed`.

    The global random state stays as it was. `model.use_bitnet` is applied by `quantization.convert_to_bitlinear`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        return Encoder(params.model, max_length=params.training.max_length)


def _blocks(options: ModelOptions, max_length: int) -> list[Block]:
    rotary = Rotary(options.rope_base) if options.positions == "rope" else None
    norm, width = NORMS[options.norm_type], options.hidden_size
    blocks: list[Block] = []
    pattern = [options.layer_pattern[i % len(options.layer_pattern)] for i in range(options.num_layers)]
    built: dict[type[Mixer], list[Mixer]] = {MIXERS[name]: [] for name in pattern}
    for index, name in enumerate(pattern):
        same = built[MIXERS[name]]
        context = MixerContext(
            hidden_size=width,
            num_heads=options.num_heads,
            retention_heads=options.retention_heads,
            dropout=options.dropout,
            causal=options.causal,
            max_length=max_length,
            layer_index=index,
            rotary=rotary,
            num_kv_heads=options.num_kv_heads,
            earlier=tuple(same),
            num_same=sum(MIXERS[other] is MIXERS[name] for other in pattern),
            norm=norm,
            ode_solver=options.ode_solver,
            ode_steps=options.ode_steps,
        )
        mixer = MIXERS[name](context, _mixer_options(name, options.mixers.get(name, {})))
        same.append(mixer)
        ffn = FeedForward(width, options.ffn_hidden_size, options.ffn_activation)
        blocks.append(Block(norm(width), mixer, norm(width), ffn, options.dropout))
    return blocks


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
    for field in dataclasses.fields(options):
        refused, value = field.metadata["not_built"], plain(getattr(options, field.name))
        if refused is not None and Draft202012Validator(refused).is_valid(value):
            raise NotBuiltYetError(f"model.{field.name}: {value!r} is not built yet in this version")
    for name in options.mixers:
        MIXERS[name]  # unknown names raise here, also those that the pattern does not use


def _part(name: str) -> str:
    """The part of the encoder that a parameter belongs to."""
    first, *rest = name.split(".")
    if first == "blocks":
        return {"mixer": "mixers", "ffn": "ffn"}.get(rest[1], "norms")
    return "norms" if first == "final_norm" else first
