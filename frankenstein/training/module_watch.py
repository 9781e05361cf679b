"""Which module is the first whose output, or whose gradient, is not finite."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass
class _Call:
    """One call of a module, and what was seen of its gradients; `bad_input_at` numbers the bad inputs of all calls."""

    module: str
    micro: int
    number: int
    bad_output: bool = False
    bad_input_at: int | None = None


class ModuleWatch:
    """Context manager: hooks on every module, for one step's forward and backward passes, that look for NaN and Inf.

    Forward, modules finish from the inside out and in the order of computation, so the first one with a bad output is
    the smallest that made it. Backward, the culprit is a module whose outputs still have finite gradients and whose
    inputs or own weights do not. Slow, since every value is looked at.
    Args:
        model: the model that runs inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name or type(model).__name__: module for name, module in model.named_modules()}
        self._calls: list[_Call] = []
        self._counts: Counter[tuple[str, int]] = Counter()
        self._micro, self._recording = -1, False
        self._bad_forward: dict[str, Any] | None = None
        self._bad_inputs = 0
        self._first_bad_output: _Call | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "ModuleWatch":
        for name, module in self._modules.items():
            hook = partial(self._after_forward, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """The forward pass of one micro-batch; calls outside of one (by gradient checkpointing) are ignored."""
        self._micro, self._recording = self._micro + 1, True
        try:
            yield
        finally:
            self._recording = False

    def first_bad(self) -> dict[str, Any] | None:
        """The first module that went wrong, ready for JSON; None where everything was finite.

        Returns: module (its name), type, micro_batch (from 0), call in it (from 1; looped layers have several), what
            ("output", "gradient of the input", "gradient of the weights", or "gradient of the output" where what
            follows the module is to blame); for an output also not_finite, of, input_finite, weights_finite.
        """
        if self._bad_forward is not None:
            return self._bad_forward
        culprits = {c.bad_input_at: c for c in self._calls if c.bad_input_at is not None and not c.bad_output}
        if culprits:
            return self._found(culprits[min(culprits)], "gradient of the input")
        call = next(filter(self._spoilt_weights, reversed(self._calls)), None)
        if call is not None:
            return self._found(call, "gradient of the weights")
        return self._found(self._first_bad_output, "gradient of the output") if self._first_bad_output else None

    def _found(self, call: _Call, what: str) -> dict[str, Any]:
        kind = type(self._modules[call.module]).__name__
        return {"module": call.module, "type": kind, "micro_batch": call.micro, "call": call.number, "what": what}

    def _spoilt_weights(self, call: _Call) -> bool:
        own = self._modules[call.module].parameters(recurse=False)
        return not call.bad_output and any(p.grad is not None and not _finite(p.grad) for p in own)

    def _after_forward(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._recording:
            return
        self._counts[name, self._micro] += 1
        call = _Call(name, self._micro, self._counts[name, self._micro])
        self._calls.append(call)
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(output))
        bad = [t for t in outputs if not _finite(t)]
        if bad and self._bad_forward is None:
            self._bad_forward = {
                **self._found(call, "output"),
                "not_finite": sum(int((~torch.isfinite(t)).sum()) for t in bad),
                "of": sum(t.numel() for t in bad),
                "input_finite": all(map(_finite, inputs)),
                "weights_finite": all(map(_finite, module.parameters(recurse=False))),
            }
        for tensors, look in ((outputs, self._output_gradient), (inputs, self._input_gradient)):
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(partial(look, call))

    def _output_gradient(self, call: _Call, gradient: Tensor) -> None:
        if not _finite(gradient):
            call.bad_output = True
            self._first_bad_output = self._first_bad_output or call

    def _input_gradient(self, call: _Call, gradient: Tensor) -> None:
        if not _finite(gradient) and call.bad_input_at is None:
            self._bad_inputs += 1
            call.bad_input_at = self._bad_inputs


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors inside arguments or an output of any nesting."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name))
