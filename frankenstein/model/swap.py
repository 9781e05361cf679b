"""Run a trained encoder with another mixer on the same weights, such as a sparse form of the attention it learned."""

import copy
import dataclasses
from typing import Any

import torch

from frankenstein.errors import FrankensteinError
from frankenstein.mixers.base import MIXERS, Mixer
from frankenstein.model.encoder import Encoder
from frankenstein.model.options import ModelOptions


def swap_mixer(encoder: Encoder, old: str, new: str, options: dict[str, Any] | None = None) -> Encoder:
    """A copy of the encoder, in evaluation mode, whose `old` layers are `new` ones with the same weights.

    The modules of the old layers are moved, not rebuilt: ternary layers stay ternary. Buffers that only the new mixer
    has keep their first values, as `fasa_attn`'s do until `calibrate`.
    Args:
        encoder: stays as it is.
        old, new: names of mixers, as in model.layer_pattern.
        options: of the new mixer, as in model.mixers; None takes what the encoder's options have.
    Returns:  Encoder; its options name the new mixer, so that it is saved and loaded like any other.
    Raises:   FrankensteinError: if the encoder has no `old` layer, or the two mixers differ in their parameters.
    """
    changed = _changed_options(encoder.options, old, new, options)
    with torch.random.fork_rng(devices=[]):
        before, after = (Encoder(o, encoder.vocab_size, encoder.max_length) for o in (encoder.options, changed))
    pattern = encoder.options.layer_pattern
    swapped = copy.deepcopy(encoder)
    for index, block in enumerate(swapped.blocks):
        if pattern[index % len(pattern)] != old:
            continue
        mixer: Mixer = after.blocks[index].mixer  # type: ignore[assignment]
        _check_fit(old, before.blocks[index].mixer, new, mixer)  # type: ignore[arg-type]
        trained: Mixer = block.mixer  # type: ignore[assignment]
        block.mixer = _with_modules_of(mixer, trained)
    swapped.options = changed
    return swapped.eval()


def _changed_options(options: ModelOptions, old: str, new: str, of_mixer: dict[str, Any] | None) -> ModelOptions:
    if MIXERS[old] is MIXERS[new]:
        raise FrankensteinError(f"swap_mixer: {old} and {new} are the same mixer; expected two different ones")
    if old not in options.layer_pattern[: options.num_layers]:
        raise FrankensteinError(f"swap_mixer: found no {old} in layer_pattern: {', '.join(options.layer_pattern)}")
    mixers = options.mixers if of_mixer is None else {**options.mixers, new: dict(of_mixer)}
    pattern = tuple(new if name == old else name for name in options.layer_pattern)
    return dataclasses.replace(options, layer_pattern=pattern, mixers=mixers)


def _check_fit(old: str, trained: Mixer, new: str, fresh: Mixer) -> None:
    """Both in full precision, as they are built: the same modules with parameters of the same names and shapes."""
    had, has = ({name: tuple(p.shape) for name, p in mixer.named_parameters()} for mixer in (trained, fresh))
    kinds = ({name: type(module) for name, module in mixer.named_children()} for mixer in (trained, fresh))
    if had == has and next(kinds) == next(kinds):
        return
    wrong = [f"{name} {had.get(name, '-')} and {has.get(name, '-')}" for name in sorted(had | has)]
    raise FrankensteinError(f"swap_mixer: {new} does not take the weights of {old}: {'; '.join(wrong)}")


def _with_modules_of(mixer: Mixer, trained: Mixer) -> Mixer:
    """The fresh mixer on the parameters of the trained one, and on its device."""
    mixer.to(next(trained.parameters()).device)
    for name, parameter in trained.named_parameters(recurse=False):
        mixer.register_parameter(name, parameter)
    for name, module in trained.named_children():
        mixer.add_module(name, module)
    return mixer
