"""Symmetric InfoNCE over the scores of a global batch of which every rank sees its own rows only.

Each rank scores its b pairs against all B: rows close where they are, columns by a log-sum-exp over the ranks. The
[B, B] matrix exists nowhere, and the gradient of a score needs no more than the two normalisers of its row and its
column, so scores may also come in tiles that are computed twice instead of kept.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from atomas.distributed.collectives import all_gather_rows, all_reduce
from atomas.distributed.partition import Partition

FalseNegatives = Literal["keep", "mask", "multi_positive"]
Relation = Callable[[Tensor, Tensor], Tensor]
"""Numbers [n] and [m] of pairs -> [n, m] bool, True where two have the same text or the same molecule."""


class OwnBlock:
    """The loss of method section 3.2 (InfoNCE over rows and over columns of S * scale, averaged), over tiles.

    1. `observe` every tile of this rank's [b, B] scores; 2. `close`; 3. `gradient` of every tile.

    Pairs related as in `Relation` are no true negatives. `mask` leaves them out of both denominators;
    `multi_positive` makes all of them targets, with equal shares (Khosla et al. 2020, arXiv 2004.11362,
    equation 2); `keep` takes them for negatives.
    """

    def __init__(
        self, scale: Tensor, partition: Partition, relation: Relation, false_negatives: FalseNegatives
    ) -> None:
        """`scale` is [1], the inverse temperature; its dtype and device are those of the statistics. Collective."""
        self.scale = scale.detach()
        self.partition = partition
        self._relation = relation
        self._mode = false_negatives
        own, total = partition.own, partition.total
        rows = own.stop - own.start
        self._row_lse = self.scale.new_full((rows,), -torch.inf)
        self._column_lse = self.scale.new_full((total,), -torch.inf)
        # Highest score of a pair that is not the own one, for the recall.
        self._row_rival = self.scale.new_full((rows,), -torch.inf)
        self._column_rival = self.scale.new_full((total,), -torch.inf)
        self._own_score = self.scale.new_zeros(rows)
        self._row_target = self.scale.new_zeros(rows)
        self._shares: Tensor | None = None
        if false_negatives == "multi_positive":
            self._shares = 1 / self._positives()

    def observe(self, scores: Tensor, rows: Tensor, columns: Tensor) -> None:
        """Take in the scores [n, m] of this rank's pairs numbered `rows` [n] with the pairs `columns` [m].

        Numbers are those in the global batch.
        """
        logits, targets, own = self._tile(scores, rows, columns)
        local = rows - self.partition.own.start
        self._row_lse[local] = torch.logaddexp(self._row_lse[local], logits.logsumexp(1))
        self._column_lse[columns] = torch.logaddexp(self._column_lse[columns], logits.logsumexp(0))
        self._row_target[local] += (targets * logits.where(targets > 0, 0)).sum(1)
        related = self._relation(rows, columns) | own if self._mode != "keep" else own
        rivals = logits.masked_fill(related, -torch.inf)
        self._row_rival[local] = torch.maximum(self._row_rival[local], rivals.amax(1))
        self._column_rival[columns] = torch.maximum(self._column_rival[columns], rivals.amax(0))
        self._own_score[local] += logits.where(own, 0).sum(1)

    def close(self) -> tuple[Tensor, Tensor]:
        """The loss, and the share of own pairs that are strictly the best of row or column. Collective.

        Returns:
            Two scalars, each of which averages over ranks to that of the global batch.
        """
        highest = torch.stack([self._column_lse, self._column_rival])
        all_reduce(highest, "highest score of each column", dist.ReduceOp.MAX)
        self._column_rival = highest[1]
        sums = all_reduce((self._column_lse - highest[0]).exp(), "sum of each column")
        self._column_lse = highest[0] + sums.log()
        own = self.partition.own
        # Pair by pair: sums of large logits would cancel, and take the digits of a small loss with them.
        total = (self._row_lse + self._column_lse[own] - self._row_target).sum()
        hits = (self._own_score > self._row_rival).sum() + (self._own_score > self._column_rival[own]).sum()
        share = self.partition.world_size / (2 * self.partition.total)
        return total * share, hits * share

    def gradient(self, scores: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the loss that `close` returned, W times this rank's part of the global one.

        Returns:
            [n, m] with regard to the scores of the tile, and [1], the tile's part of that of `scale`.
        """
        logits, targets, _ = self._tile(scores, rows, columns)
        row_lse = self._row_lse[rows - self.partition.own.start]
        of_logits = (logits - row_lse[:, None]).exp() + (logits - self._column_lse[columns]).exp() - targets
        of_logits *= self.partition.world_size / (2 * self.partition.total)
        return of_logits * self.scale, (of_logits * scores).sum()[None]

    def _tile(self, scores: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits with -inf where a pair does not count, weight of each as a target of row and column, own pairs."""
        logits = scores.detach() * self.scale
        own = rows[:, None] == columns
        if self._mode == "keep":
            return logits, 2 * own.to(logits.dtype), own
        related = self._relation(rows, columns) | own
        if self._shares is not None:
            return logits, related * (self._shares[rows][:, None] + self._shares[columns]), own
        return logits.masked_fill(related & ~own, -torch.inf), 2 * own.to(logits.dtype), own

    def _positives(self) -> Tensor:
        """[B] number of pairs that are related to each pair, itself included; rows are counted where they are."""
        own, device = self.partition.own, self.scale.device
        everyone = torch.arange(self.partition.total, device=device)
        counts = [
            (self._relation(rows, everyone) | (rows[:, None] == everyone)).sum(1)
            for rows in everyone[own].split(256)
        ]
        mine = torch.cat(counts).to(self.scale.dtype)
        return all_gather_rows(mine, self.partition.sizes, "numbers of positives")


class _CloseOwnBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, scale: Tensor, block: OwnBlock) -> tuple[Tensor, Tensor]:
        everyone = torch.arange(block.partition.total, device=scores.device)
        ctx.block, ctx.rows, ctx.columns = block, everyone[block.partition.own], everyone
        ctx.save_for_backward(scores)
        block.observe(scores, ctx.rows, ctx.columns)
        loss, recall = block.close()
        ctx.mark_non_differentiable(recall)
        return loss, recall

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (scores,) = ctx.saved_tensors
        of_scores, of_scale = ctx.block.gradient(scores, ctx.rows, ctx.columns)
        return of_scores * grads[0], of_scale * grads[0], None


def own_block_info_nce(scores: Tensor, scale: Tensor, block: OwnBlock) -> tuple[Tensor, Tensor]:
    """Loss and recall of a block that is kept whole, see `OwnBlock.close`. Collective.

    Args:
        scores: [b, B], this rank's pairs against all; differentiable.
        scale: [1]; differentiable.
        block: fresh, made with this scale.
    """
    loss, recall = _CloseOwnBlock.apply(scores, scale, block)
    return loss, recall
