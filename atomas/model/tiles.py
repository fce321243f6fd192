"""The loss of one level from tiles of scores that are computed twice and never kept.

Once for the loss, once more for its gradient: of the [B, B] scores only one tile is in memory, and of the tokens of
other ranks only what `exchange` brings at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atomas.distributed.collectives import rank
from atomas.distributed.exchange import ExchangeMode, Owners, visit_blocks, visit_blocks_with_gradient
from atomas.distributed.own_block import OwnBlock
from atomas.distributed.partition import Chunks, Partition
from atomas.model.interaction import Tokens, as_leaves, join_rows, score, split_rows
from atomas.model.row_store import MemoryStore, RowStore


@dataclass(frozen=True, kw_only=True)
class Side:
    """One modality at one level."""

    rows: RowStore
    """This rank's tokens in chunks, made by `join_rows`"""
    lengths: Tensor
    """[B] int64, tokens of every pair of the global batch"""

    @classmethod
    def whole(cls, tokens: Tokens, lengths: Tensor) -> "Side":
        """A side whose tokens are one chunk."""
        store = MemoryStore(lengths.device, lengths.device)
        store.append(join_rows(*tokens))
        return cls(rows=store, lengths=lengths)


WHOLE = Chunks()
"""All pairs of a rank at once."""


class TiledLevel:
    """InfoNCE between the pairs of this rank's `own` side and those of all ranks' `travelling` side."""

    def __init__(
        self,
        own: Side,
        travelling: Side,
        block: OwnBlock,
        exchange: ExchangeMode,
        *,
        chunks: Chunks = WHOLE,
        what: str,
    ) -> None:
        """Every rank's sides are cut into the same `chunks`; `block` is fresh."""
        self._own, self._travelling = own, travelling
        self._block, self._exchange, self._what = block, exchange, what
        self._partition: Partition = block.partition
        self._chunks = chunks
        self._travelling_lengths = travelling.lengths.cpu()

    def close(self) -> tuple[Tensor, Tensor]:
        """Loss and recall, see `OwnBlock.close`. Collective."""
        for number in range(len(self._chunks)):

            def observe(rows: Tensor, owners: Owners, number: int = number) -> None:
                columns, others = self._columns(owners, number), split_rows(rows)
                for own in range(len(self._chunks)):
                    tokens, numbers = split_rows(self._own.rows[own]), self._numbers(own)
                    self._block.observe(self._scores(tokens, numbers, others, columns), numbers, columns)

            with torch.no_grad():
                sizes = self._sizes(number)
                visit_blocks(self._travelling.rows[number], sizes, self._exchange, observe, what=self._what)
        return self._block.close()

    def gradient(self, of_own: RowStore, of_travelling: RowStore, weight: Tensor) -> Tensor:
        """Gradient of `weight` times the loss, after `close`. Collective.

        Args:
            of_own: filled with the gradient of each chunk of the own side, [n, D + 1] by `join_rows`.
            of_travelling: filled with that of each chunk of this rank's travelling side.
            weight: scalar.

        Returns:
            [1], this rank's part of the gradient of the scale.
        """
        of_scale = torch.zeros_like(self._block.scale)
        for number in range(len(self._chunks)):

            def differentiate(rows: Tensor, owners: Owners, number: int = number) -> Tensor:
                columns, others = self._columns(owners, number), as_leaves(*split_rows(rows))
                of_others = join_rows(*(torch.zeros_like(x, dtype=of_scale.dtype) for x in others))
                for own in range(len(self._chunks)):
                    tokens, numbers = as_leaves(*split_rows(self._own.rows[own])), self._numbers(own)
                    with torch.enable_grad():
                        scores = self._scores(tokens, numbers, others, columns)
                    of_scores, share = self._block.gradient(scores.detach(), numbers, columns)
                    of_scale.add_(share)
                    gradients = torch.autograd.grad(scores, (*tokens, *others), of_scores * weight)
                    of_tokens = join_rows(*gradients[:2])
                    if own < len(of_own):
                        of_own[own] = of_own[own] + of_tokens
                    else:
                        of_own.append(of_tokens)
                    of_others += join_rows(*gradients[2:])
                return of_others

            of_travelling.append(
                visit_blocks_with_gradient(
                    self._travelling.rows[number],
                    self._sizes(number),
                    self._exchange,
                    differentiate,
                    what=self._what,
                )
            )
        return of_scale * weight

    def _scores(self, own: Tokens, numbers: Tensor, others: Tokens, columns: Tensor) -> Tensor:
        return score(own, others, self._own.lengths[numbers], self._travelling.lengths[columns])

    def _numbers(self, chunk: int) -> Tensor:
        """[n] int64: numbers of this rank's pairs in a chunk."""
        return self._columns([rank()], chunk)

    def _columns(self, owners: Owners, chunk: int) -> Tensor:
        """[m] int64: numbers of the pairs in one chunk of several ranks."""
        parts = [self._partition.chunk(owner, chunk, self._chunks) for owner in owners]
        device = self._own.lengths.device
        return torch.cat([torch.arange(part.start, part.stop, device=device) for part in parts])

    def _sizes(self, chunk: int) -> list[int]:
        """Tokens in one chunk of every rank's travelling side."""
        parts = [
            self._partition.chunk(owner, chunk, self._chunks) for owner in range(self._partition.world_size)
        ]
        return [int(self._travelling_lengths[part].sum()) for part in parts]


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,
        own_weight: Tensor,
        travelling: Tensor,
        travelling_weight: Tensor,
        scale: Tensor,
        level: TiledLevel,
    ) -> tuple[Tensor, Tensor]:
        ctx.level = level
        loss, recall = level.close()
        ctx.mark_non_differentiable(recall)
        return loss, recall

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        device = grads[0].device
        of_own, of_travelling = MemoryStore(device, device), MemoryStore(device, device)
        of_scale = ctx.level.gradient(of_own, of_travelling, grads[0])
        return *split_rows(of_own[0]), *split_rows(of_travelling[0]), of_scale, None


def tiled_info_nce(
    own: Tokens, travelling: Tokens, scale: Tensor, level: TiledLevel
) -> tuple[Tensor, Tensor]:
    """Loss and recall of a level with a single chunk; its backward pass is `level.gradient`. Collective.

    Args:
        own: the chunk of the own side; differentiable.
        travelling: that of the travelling side; differentiable.
        scale: [1]; differentiable.
        level: made of the same values.
    """
    loss, recall = _TiledLoss.apply(*own, *travelling, scale, level)
    return loss, recall
