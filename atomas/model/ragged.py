"""Operations on flat ragged values."""

import torch
from torch import Tensor


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum over the tokens of each sequence, [T, D] -> [B, D]; in a fixed order, so that a run repeats."""
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)


def positions(lengths: Tensor) -> Tensor:
    """[T] int64: place of every token within its own sequence, from 0."""
    starts = lengths.cumsum(0) - lengths
    offset = torch.repeat_interleave(starts, lengths)
    return torch.arange(offset.shape[0], device=lengths.device) - offset
