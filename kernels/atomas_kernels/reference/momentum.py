"""Momentum update of the slow encoder's float32 masters (method.md 2)."""

import torch
from torch import Tensor


@torch.no_grad()
def momentum_update(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    """See `atomas_kernels.momentum_update`. Half-precision sources are widened one by one, the others go together."""
    pairs = list(zip(targets, sources, strict=True))
    single = [pair for pair in pairs if pair[1].dtype == torch.float32]
    if single:
        torch._foreach_lerp_([target for target, _ in single], [source for _, source in single], 1 - momentum)
    for target, source in pairs:
        if source.dtype != torch.float32:
            target.lerp_(source.float(), 1 - momentum)
