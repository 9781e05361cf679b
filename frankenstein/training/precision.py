"""Number types of a run: float32, or autocast to bfloat16 or float16, the latter with a scaled loss.

    scaled: backward(S loss), gradient / S;  a step with an Inf or NaN in it is left out and S halved; S doubles after
    2000 good steps in a row
Source: Micikevicius et al. 2018, section 3.2, https://arxiv.org/abs/1710.03740; torch.amp.GradScaler.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer


class Precision:
    """Autocast and loss scaling.

    A gradient that overflows because of the scale is no instability. From a scale of 1 downwards the scale is no longer
    the reason, and the step counts as unstable. GradScaler.step is never called, since it waits for the device.
    Args:
        device: where the model trains.
        amp: autocast at all.
        dtype: bfloat16 or float16.
        scale: the first scale.
    """

    def __init__(self, device: torch.device, *, amp: bool, dtype: str, scale: float = 2.0**16) -> None:
        self.device, self.amp = device, amp
        self.dtype = torch.float16 if dtype == "float16" else torch.bfloat16
        scaled = amp and self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=scaled)

    @property
    def scaled(self) -> bool:
        """Whether the loss is scaled."""
        return self.scaler.is_enabled()

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The type that matrix products are computed in."""
        return self.dtype if self.amp else torch.float32

    def autocast(self) -> torch.autocast:
        """Context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.amp)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the (scaled) loss."""
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Divide the gradients by the scale, then adapt it; call once a step, with all gradients there.

        Returns: scaler_scale, the scale that was used, and overflow (bool): Inf or NaN stood in the gradients, and
        the scale may be the reason. 0-dim, on the device. Nothing without a scale.
        """
        if not self.scaled:
            return {}
        one = torch.ones((), device=self.device)
        used = self.scaler.scale(one)
        self.scaler.unscale_(optimizer)
        self.scaler.update()
        return {"scaler_scale": used, "overflow": (self.scaler.scale(one) < used) & (used > 1)}
