"""The two layouts of a batch of sequences: ragged, which the operators compute on, and padded.

Ragged: tokens `[T, ...]`, sequence after sequence, with `lengths` `[B]` (sum T), or equally `cu_seqlens`
`[B + 1]`, their running sum from 0. Padded: tokens `[B, N, ...]`, sequence i in the first `lengths[i]` places of
its row; what lies behind them is never read.
"""

import torch
from torch import Tensor

from atomas_kernels import checks


def lengths_from_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """`lengths` [B] int64 from `cu_seqlens` [B + 1], int32 or int64.

    Raises ValueError unless it starts with 0 and never decreases.
    """
    checks.tensor("cu_seqlens", cu_seqlens, dims=1, device=None)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {cu_seqlens.dtype}")
    if not len(cu_seqlens) or int(cu_seqlens[0]) != 0:
        raise ValueError("cu_seqlens: must start with 0")
    lengths = cu_seqlens.to(torch.int64).diff()
    if bool((lengths < 0).any()):
        where = int((lengths < 0).nonzero()[0])
        raise ValueError(f"cu_seqlens: decreases behind entry {where}; it must be a running sum of lengths")
    return lengths


def cu_seqlens_from_lengths(lengths: Tensor) -> Tensor:
    """`cu_seqlens` [B + 1] int32, as attention libraries take it, from `lengths` [B] int64."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


class PaddedBatch:
    """Where the tokens of B sequences lie among the N places of a row each."""

    def __init__(self, name: str, padded: Tensor, lengths_name: str, lengths: Tensor) -> None:
        """Layout of `padded` [B, N, ...]; ValueError, naming the argument, where `lengths` do not fit it."""
        checks.tensor(name, padded, dims=max(2, checks.dims(name, padded)), device=None)
        checks.lengths(lengths_name, lengths, device=padded.device)
        checks.same_size(lengths_name, lengths, 0, name, padded, 0)
        places = padded.shape[1]
        if bool(((lengths < 0) | (lengths > places)).any()):
            low, high = int(lengths.min()), int(lengths.max())
            raise ValueError(f"{lengths_name}: from {low} to {high}, but {name} has {places} places in a row")
        self.mask = torch.arange(places, device=padded.device) < lengths[:, None]
        """[B, N] bool, True where there is a token"""

    def pack(self, name: str, padded: Tensor) -> Tensor:
        """[B, N, ...] -> [T, ...], differentiable; `name` is the argument that an error is about."""
        checks.tensor(name, padded, dims=checks.dims(name, padded), device=self.mask.device)
        if padded.shape[:2] != self.mask.shape:
            raise ValueError(
                f"{name}: expected {tuple(self.mask.shape)} first, got shape {tuple(padded.shape)}"
            )
        return padded[self.mask]

    def pad(self, ragged: Tensor, fill: float = 0) -> Tensor:
        """[T, ...] -> [B, N, ...] with `fill` where there is no token, differentiable."""
        padded = ragged.new_full((*self.mask.shape, *ragged.shape[1:]), fill)
        if ragged.numel() == 0:
            # Part of the graph as every other result is.
            return padded + ragged.sum()
        # Out of place, so that the gradient of the ragged values is a plain gather.
        return padded.masked_scatter(self._expanded(padded), ragged)

    def _expanded(self, padded: Tensor) -> Tensor:
        return self.mask.view(*self.mask.shape, *(1 for _ in padded.shape[2:])).expand_as(padded)


def pad(ragged: Tensor, lengths: Tensor) -> Tensor:
    """[T, ...] -> [B, max N, ...], zeros behind each sequence."""
    rows = ragged.new_empty(len(lengths), int(lengths.max()) if len(lengths) else 0)
    return PaddedBatch("ragged", rows, "lengths", lengths).pad(ragged)
