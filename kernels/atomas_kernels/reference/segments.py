"""Operations over the sequences of a ragged batch."""

import torch
from torch import Tensor

from atomas_kernels import checks


def segment_softmax(logits: Tensor, lengths: Tensor) -> Tensor:
    """See `atomas_kernels.segment_softmax`."""
    checks.segment_sizes("lengths", lengths, logits.shape[0])
    values = compute_dtype(logits)
    index = segment_index(lengths)
    highest = values.new_full(lengths.shape, -torch.inf)
    highest = highest.scatter_reduce(0, index, values.detach(), "amax")
    # A sequence of -inf alone would give -inf - -inf = NaN.
    highest = highest.masked_fill(highest == -torch.inf, 0)
    exponential = (values - highest[index]).exp()
    total = values.new_zeros(lengths.shape).index_add(0, index, exponential)
    total = total.masked_fill(total == 0, 1)
    return (exponential / total[index]).to(logits.dtype)


def segment_index(lengths: Tensor) -> Tensor:
    """[T] int64: the sequence that each token belongs to."""
    return torch.repeat_interleave(torch.arange(lengths.shape[0], device=lengths.device), lengths)


def compute_dtype(values: Tensor) -> Tensor:
    """float64 stays, everything else is computed in float32."""
    return values if values.dtype == torch.float64 else values.float()
