"""Between flat ragged tokens and the padded blocks that dense attention wants."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """Some sequences of a ragged batch as a padded block of n rows and L slots."""

    index: Tensor
    """[n, L] int64, position of the slot's token in the flat tensor; 0 at padding"""
    mask: Tensor
    """[n, L] bool, True where the slot holds a token"""

    @classmethod
    def of(cls, lengths: Tensor, rows: Tensor) -> "PaddedRows":
        """Sequences `rows` [n] of a ragged batch with `lengths` [B]; L is the longest of them."""
        starts = (lengths.cumsum(0) - lengths)[rows]
        slots = torch.arange(int(lengths[rows].max()), device=lengths.device)
        mask = slots < lengths[rows, None]
        return cls(index=torch.where(mask, starts[:, None] + slots, 0), mask=mask)

    def pad(self, flat: Tensor) -> Tensor:
        """[T, ...] -> [n, L, ...]. Padding holds a copy of the first token: whoever reads must mask."""
        return flat.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)


def flatten(blocks: Sequence[PaddedRows], padded: Sequence[Tensor]) -> Tensor:
    """Undo `pad`: blocks that together hold every row once, [n, L, ...] each -> [T, ...]."""
    slots = torch.cat([values.flatten(0, 1) for values in padded])
    mask = torch.cat([block.mask.flatten() for block in blocks])
    token_of_slot = torch.cat([block.index.flatten() for block in blocks])[mask]
    slot_of_token = torch.empty_like(token_of_slot)
    slot_of_token[token_of_slot] = mask.nonzero().squeeze(1)
    return slots.index_select(0, slot_of_token)


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum over the tokens of each sequence, [T, D] -> [B, D]; in a fixed order, so that a run repeats."""
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)


def positions(lengths: Tensor) -> Tensor:
    """[T] int64: place of every token within its own sequence, from 0."""
    starts = lengths.cumsum(0) - lengths
    offset = torch.repeat_interleave(starts, lengths)
    return torch.arange(offset.shape[0], device=lengths.device) - offset
