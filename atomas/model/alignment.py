"""Hierarchical adaptive alignment: every level of every text against every molecule (method section 3).

Each rank clusters its own b pairs and scores their texts against the molecules of all ranks, or their molecules
against all texts, whichever has fewer tokens to send. Of its [b, B] block it closes the rows, and with the other ranks
the columns; with exact gradients of what was sent, averaged over the ranks, this is the gradient of the global batch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from atomas.config import LossConfig, ModelConfig
from atomas.distributed.collectives import all_gather_rows
from atomas.distributed.own_block import OwnBlock, own_block_info_nce
from atomas.distributed.partition import Partition
from atomas.model.encoder import Modality
from atomas.model.global_batch import GlobalBatch
from atomas.model.interaction import Tokens, block_scores, score
from atomas.model.layers import Linear, at_least_float32, product_dtype
from atomas.model.polymerization import Clusters, Polymerization
from atomas.model.tiles import Side, TiledLevel, tiled_info_nce
from atomas.phases import phase
from atomas_kernels import segment_softmax

Modal = TypeVar("Modal")
"""What stands for one modality."""


class Level(NamedTuple):
    """B sequences of one modality at one level: 0 tokens, 1 fragments or phrases, 2 molecule or paragraph."""

    tokens: Tensor
    """[T, D] in the dtype of the run's matrix products"""
    lengths: Tensor
    """[B] int64, sums to T"""
    weight: Tensor | None
    """[T] importance, float32, sums to 1 over each sequence; None where the level is passed through but not aligned"""
    assignment: Tensor | None
    """[tokens of the level below] int64, the number of the cluster each of them joined; None at level 0"""

    @property
    def weighted(self) -> Tokens:
        """Tokens and weight of a level that is aligned."""
        assert self.weight is not None
        return self.tokens, self.weight


class Hierarchy(nn.Module):
    """All levels of one modality."""

    def __init__(self, width: int, model: ModelConfig, level_weights: Sequence[float]) -> None:
        """Build what the levels with a weight need: nothing is created that would never see a gradient."""
        super().__init__()
        aligned = [level for level, weight in enumerate(level_weights) if weight]
        self.polymerizations = nn.ModuleList(
            Polymerization(
                width,
                ratio=ratio,
                neighbours=model.neighbours,
                heads=model.polymerization_heads,
            )
            for ratio in model.ratios[: max(aligned)]
        )
        self.importance = nn.ModuleDict({str(level): ImportanceMLP(width) for level in aligned})

    def forward(
        self, states: Tensor, lengths: Tensor, clusters: Sequence[Clusters] | None = None
    ) -> list[Level]:
        """Encoder states [T, D] of B sequences -> levels from 0 to the highest with a weight.

        `clusters` are those of an earlier pass over the same states; None finds them.

        Tokens are rounded on their way out only: clustering, a discrete choice, and what the next level is made of see
        them in float32.
        """
        rounded = product_dtype(next(self.importance.parameters()))
        tokens, assignment = at_least_float32(states), None
        levels = []
        for number in range(len(self.polymerizations) + 1):
            if number:
                with phase("polymerisation"):
                    known = None if clusters is None else clusters[number - 1]
                    step = self.polymerizations[number - 1](tokens, lengths, known)
                tokens, lengths, assignment = step.tokens, step.lengths, step.assignment
            weight = None
            if str(number) in self.importance:
                weight = segment_softmax(self.importance[str(number)](tokens), lengths)
            levels.append(Level(tokens.to(rounded), lengths, weight, assignment))
        return levels


class ImportanceMLP(nn.Sequential):
    """Importance of a token before the softmax over its sequence: D -> 2 D -> 1."""

    def __init__(self, width: int) -> None:
        super().__init__(Linear(width, 2 * width), nn.ReLU(), Linear(2 * width, 1))

    def forward(self, input: Tensor) -> Tensor:
        """[T, D] -> [T]."""
        logits: Tensor = super().forward(input)
        return logits.squeeze(1)


class HierarchicalAlignment(nn.Module):
    """L_haa: the weighted sum over levels of a symmetric InfoNCE over token interactions."""

    def __init__(self, width: int, model: ModelConfig, loss: LossConfig) -> None:
        super().__init__()
        self.level_weights = {level: weight for level, weight in enumerate(loss.level_weights) if weight}
        """of the levels that are aligned"""
        self.exchange = loss.exchange
        self.false_negatives = loss.false_negatives
        self.text = Hierarchy(width, model, loss.level_weights)
        self.smiles = Hierarchy(width, model, loss.level_weights)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(loss.logit_scale)]))

    def hierarchy(self, modality: Modality) -> Hierarchy:
        """The levels of one modality."""
        return self.text if modality == "text" else self.smiles

    def scale(self) -> Tensor:
        """[1], the inverse temperature."""
        return at_least_float32(self.logit_scale).exp()

    def forward(self, text: list[Level], smiles: list[Level], everyone: GlobalBatch) -> dict[str, Tensor]:
        """Loss of the global batch from the levels of this rank's b pairs. Collective.

        Args:
            text: levels of the texts.
            smiles: levels of the molecules, in the same order.
            everyone: the pairs of all ranks.

        Returns:
            Scalars, whose means over ranks are those of the global batch: `loss/hierarchical`, `logit_scale`, and
            of every level with a weight `loss/level_l` and `recall/level_l` (in-batch R@1, mean of both
            directions; ties are lost).
        """
        scale = self.scale()
        lengths = gather_lengths(
            {n: (text[n].lengths, smiles[n].lengths) for n in self.level_weights}, everyone
        )
        found = {}
        for number in self.level_weights:
            (own, own_lengths), (sent, sent_lengths) = larger_first(
                text[number], smiles[number], lengths[number]
            )
            block = OwnBlock(scale, everyone.partition, everyone.related, self.false_negatives)
            what = f"tokens of level {number}"
            with phase("interaction"):
                if self.exchange == "ring" and everyone.partition.world_size > 1:
                    sides = Side.whole(own.weighted, own_lengths), Side.whole(sent.weighted, sent_lengths)
                    tiles = TiledLevel(*sides, block, self.exchange, what=what)
                    found[number] = tiled_info_nce(own.weighted, sent.weighted, scale, tiles)
                else:
                    scores = scores_with_all(own, sent, sent_lengths, everyone.partition, what=what)
                    found[number] = own_block_info_nce(scores, scale, block)
        return self.total(found) | {"logit_scale": scale.squeeze(0)}

    def total(self, found: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Loss and recall of every level -> scalars under their names, with their weighted sum."""
        weighted = [self.level_weights[number] * loss for number, (loss, _) in found.items()]
        parts = {"loss/hierarchical": torch.stack(weighted).sum()}
        for number, (loss, recall) in found.items():
            parts |= {f"loss/level_{number}": loss.detach(), f"recall/level_{number}": recall}
        return parts

    def scores(self, text: list[Level], smiles: list[Level]) -> Tensor:
        """Score [A, C] of every text with every molecule: the levels' S, averaged by their weight."""
        total = sum(weight * interaction(text[n], smiles[n]) for n, weight in self.level_weights.items())
        return torch.as_tensor(total) / sum(self.level_weights.values())


def interaction(text: Level, smiles: Level) -> Tensor:
    """Weighted token interaction S [A, C] of A texts with C molecules of one level (method section 3.2).

    S is the mean of both directions, so the sides may be exchanged: S(smiles, text) is the transpose.
    """
    return score(text.weighted, smiles.weighted, text.lengths, smiles.lengths)


def gather_lengths(
    own: Mapping[int, tuple[Tensor, Tensor]], everyone: GlobalBatch
) -> dict[int, tuple[Tensor, Tensor]]:
    """[b] lengths of this rank's texts and SMILES at some levels -> [B] of all ranks', in one collective."""
    rows = torch.stack([lengths for both in own.values() for lengths in both], dim=1)
    columns = all_gather_rows(rows, everyone.partition.sizes, "lengths of the levels").unbind(1)
    return {number: (columns[2 * place], columns[2 * place + 1]) for place, number in enumerate(own)}


def larger_first(text: Modal, smiles: Modal, lengths: tuple[Tensor, Tensor]) -> list[tuple[Modal, Tensor]]:
    """Both modalities, each with its [B] lengths; the one with fewer tokens, cheaper to send, comes last."""
    sides = [(text, lengths[0]), (smiles, lengths[1])]
    text_tokens, smiles_tokens = torch.stack(lengths).sum(1).tolist()
    return sides if text_tokens >= smiles_tokens else sides[::-1]


def scores_with_all(own: Level, sent: Level, lengths: Tensor, partition: Partition, *, what: str) -> Tensor:
    """S [b, B] of this rank's sequences with those of the other modality of all ranks, with gradient. Collective.

    Args:
        own: b sequences.
        sent: this rank's b sequences of the other modality.
        lengths: [B] of all ranks' of these.
        partition: which of them are on which rank.
        what: name of what is sent, for people.
    """
    sizes = [int(part.sum()) for part in lengths.cpu().split(list(partition.sizes))]
    return block_scores(own.weighted, sent.weighted, own.lengths, lengths, sizes, what=what)


@torch.no_grad()
def recall_at_1(scores: Tensor, own: Tensor, not_negative: Tensor | None) -> Tensor:
    """Share of rows of [n, m] `scores` in which the column `own` [n] is higher than all others.

    Pairs that are True in `not_negative` [n, m] do not compete.
    """
    own_score = scores.gather(1, own[:, None])
    rivals = scores.scatter(1, own[:, None], float("-inf"))
    if not_negative is not None:
        rivals = rivals.masked_fill(not_negative, float("-inf"))
    return (own_score[:, 0] > rivals.amax(dim=1)).to(scores.dtype).mean()
