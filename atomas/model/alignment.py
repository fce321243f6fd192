"""Hierarchical adaptive alignment: every level of every text against every molecule (method section 3).

Each rank clusters its own b pairs and scores its own texts against the molecules of all ranks; the [b, B]
blocks are gathered, and every rank closes the same loss over [B, B]. With the exact gather and averaged
gradients this is the gradient of the global batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atomas.config import LossConfig, ModelConfig
from atomas.distributed.collectives import world_size
from atomas.distributed.gather import gather_rows
from atomas.model.layers import Linear, at_least_float32, full_precision
from atomas.model.polymerization import Polymerization
from atomas_kernels import info_nce, segment_softmax, token_interaction


class Level(NamedTuple):
    """B sequences of one modality at one level: 0 tokens, 1 fragments or phrases, 2 molecule or paragraph."""

    tokens: Tensor
    """[T, D]"""
    lengths: Tensor
    """[B] int64, sums to T"""
    weight: Tensor | None
    """[T] importance, sums to 1 over each sequence; None where the level is passed through but not aligned"""
    assignment: Tensor | None
    """[tokens of the level below] int64, the number of the cluster each of them joined; None at level 0"""


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

    def forward(self, states: Tensor, lengths: Tensor) -> list[Level]:
        """Encoder states [T, D] of B sequences -> levels from 0 to the highest with a weight."""
        tokens, assignment = at_least_float32(states), None
        levels = []
        for number in range(len(self.polymerizations) + 1):
            if number:
                step = self.polymerizations[number - 1](tokens, lengths)
                tokens, lengths, assignment = step.tokens, step.lengths, step.assignment
            weight = None
            if str(number) in self.importance:
                weight = segment_softmax(self.importance[str(number)](tokens), lengths)
            levels.append(Level(tokens=tokens, lengths=lengths, weight=weight, assignment=assignment))
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
        self.level_weights = loss.level_weights
        self.text = Hierarchy(width, model, loss.level_weights)
        self.smiles = Hierarchy(width, model, loss.level_weights)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(loss.logit_scale)]))

    def forward(
        self, text: list[Level], smiles: list[Level], negative_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Loss of the global batch from the levels of this rank's b pairs.

        Args:
            text: levels of the texts.
            smiles: levels of the molecules, in the same order.
            negative_mask: [B, B] bool; True leaves a pair out of the negatives. None keeps all.

        Returns:
            Scalars, the same on every rank: `loss/hierarchical`, `logit_scale`, and of every level with a
            weight `loss/level_l` and `recall/level_l` (in-batch R@1, mean of both directions).
        """
        scale = at_least_float32(self.logit_scale).exp()
        total = torch.zeros_like(scale[0])
        parts: dict[str, Tensor] = {}
        for number, weight in enumerate(self.level_weights):
            if not weight:
                continue
            scores = gather_rows(interaction(text[number], gather_level(smiles[number])), what="scores")
            loss = info_nce(scores, scale, negative_mask=negative_mask)
            total = total + weight * loss
            parts[f"loss/level_{number}"] = loss.detach()
            own = torch.arange(len(scores), device=scores.device)
            recalls = [recall_at_1(view, own, negative_mask) for view in (scores, scores.T)]
            parts[f"recall/level_{number}"] = torch.stack(recalls).mean()
        return {"loss/hierarchical": total, **parts, "logit_scale": scale.squeeze(0)}

    def scores(self, text: list[Level], smiles: list[Level]) -> Tensor:
        """Score [A, C] of every text with every molecule: the levels' S, averaged by their weight."""
        weights = {number: weight for number, weight in enumerate(self.level_weights) if weight}
        total = sum(weight * interaction(text[n], smiles[n]) for n, weight in weights.items())
        return torch.as_tensor(total) / sum(weights.values())


def interaction(text: Level, smiles: Level) -> Tensor:
    """Weighted token interaction S [A, C] of A texts with C molecules of one level (method section 3.2)."""
    assert text.weight is not None
    assert smiles.weight is not None
    with full_precision(text.tokens.device):
        return token_interaction(
            text.tokens, smiles.tokens, text.weight, smiles.weight, text.lengths, smiles.lengths
        )


def gather_level(level: Level) -> Level:
    """The level of all ranks' sequences, with gradient; every rank must hold the same number of sequences."""
    ranks = world_size()
    if ranks == 1:
        return level
    assert level.weight is not None
    lengths = gather_rows(level.lengths, [len(level.lengths)] * ranks, what="lengths")
    sizes = lengths.unflatten(0, (ranks, -1)).sum(dim=1).tolist()
    # One collective for both: the weight rides as a last column.
    packed = gather_rows(torch.cat([level.tokens, level.weight[:, None]], dim=1), sizes, what="tokens")
    return Level(tokens=packed[:, :-1], lengths=lengths, weight=packed[:, -1], assignment=None)


@torch.no_grad()
def recall_at_1(scores: Tensor, own: Tensor, not_negative: Tensor | None) -> Tensor:
    """Share of rows of [n, m] `scores` in which the column `own` [n] is the highest.

    Pairs that are True in `not_negative` [n, m] do not compete.
    """
    if not_negative is not None:
        scores = scores.masked_fill(not_negative.scatter(1, own[:, None], False), float("-inf"))
    return (scores.argmax(dim=1) == own).to(scores.dtype).mean()
