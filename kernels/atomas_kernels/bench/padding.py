"""Ragged tokens to the padded form that the plain PyTorch providers need."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Places of ragged tokens in a padded batch [B, N]."""

    mask: Tensor
    """[B, N] bool, True at tokens."""
    index: Tensor
    """[T] int64, place of each token in the flattened batch."""

    @classmethod
    def of(cls, lengths: Tensor, *, length: int | None = None) -> "Padding":
        """To `length` places, or to the longest sequence; to the longest, too, where all lengths are equal."""
        if length is None or lengths.unique().numel() <= 1:
            length = int(lengths.max())
        mask = torch.arange(length, device=lengths.device) < lengths[:, None]
        return cls(mask=mask, index=mask.flatten().nonzero().squeeze(1))

    def __call__(self, values: Tensor) -> Tensor:
        """[T, ...] -> [B, N, ...], zero at padding."""
        flat = values.new_zeros(self.mask.numel(), *values.shape[1:]).index_copy(0, self.index, values)
        return flat.view(*self.mask.shape, *values.shape[1:])
