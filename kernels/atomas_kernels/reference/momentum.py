"""Momentum update of the slow encoder's float32 masters (method.md 2)."""

import torch
from torch import Tensor


@torch.no_grad()
def momentum_update(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    """See `atomas_kernels.momentum_update`."""
    torch._foreach_lerp_(targets, [source.float() for source in sources], 1 - momentum)
