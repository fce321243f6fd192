"""Sequence to one vector: [T, D] flat states and [B] lengths -> [B, D], not normalised (method section 2)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from atomas.errors import AtomasError
from atomas.model.layers import Linear, at_least_float32
from atomas.model.ragged import positions, segment_sum
from atomas_kernels import segment_softmax


def build_pooler(
    name: Literal["position_linear", "mean", "attention"], *, width: int, max_length: int
) -> nn.Module:
    """The pooler of one modality; `max_length` is read by `position_linear` only."""
    if name == "position_linear":
        return PositionLinear(max_length)
    if name == "attention":
        return AttentionPooling(width)
    return MeanPooling()


class MeanPooling(nn.Module):
    """Mean over the tokens of a sequence."""

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """See the module."""
        return segment_sum(at_least_float32(states), lengths) / lengths[:, None]


class AttentionPooling(nn.Module):
    """Mean weighted by a softmax over a learned score of each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = Linear(width, 1)

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """See the module."""
        weight = segment_softmax(self.score(states).squeeze(1), lengths)
        return segment_sum(at_least_float32(states) * weight[:, None], lengths)


class PositionLinear(nn.Module):
    """The published pooling: one learned weight per position, and a bias that every component shares.

    The published code multiplies padding too; here only the tokens of the sequence count.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(max_length)
        self.weight = nn.Parameter(torch.empty(1, max_length).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound))

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """See the module. AtomasError for a sequence longer than there are positions."""
        longest, limit = int(lengths.max()), self.weight.shape[1]
        if longest > limit:
            raise AtomasError(
                f"a sequence of {longest} tokens: position_linear pooling was built for {limit} "
                "(data.max_text_tokens, data.max_smiles_tokens); cut it, or train with more positions"
            )
        x = at_least_float32(states)
        weight = self.weight[0].to(x.dtype).index_select(0, positions(lengths))
        return segment_sum(x * weight[:, None], lengths) + self.bias.to(x.dtype)
