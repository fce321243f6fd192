"""Clusters of a pair at every level, and how well each cluster of the text matches each of the molecule."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from atomas.data.batching import RaggedTokens
from atomas.data.tokenizer import AtomasTokenizer
from atomas.errors import AtomasError
from atomas.model.alignment import Level
from atomas.model.atomas import AtomasModel
from atomas.model.encoder import Modality

Offsets = list[tuple[int, int]]
"""Characters [start, end) of every token; empty for </s> and a word start on its own"""


@dataclass(frozen=True, kw_only=True)
class SequenceClusters:
    """One sequence of N tokens at one level, where they make K clusters (at level 0 each token is its own)."""

    cluster: NDArray[np.int64]
    """[N] the cluster that each token has ended up in"""
    weight: NDArray[np.float32]
    """[K] importance, sums to 1"""
    features: NDArray[np.float32]
    """[K, D], L2-normalised"""


@dataclass(frozen=True, kw_only=True)
class LevelCorrespondence:
    """A pair at one level: K_t clusters of the text, K_s of the molecule."""

    number: int
    text: SequenceClusters
    smiles: SequenceClusters

    @property
    def similarity(self) -> NDArray[np.float32]:
        """[K_t, K_s] cosines, what the token interaction takes its maxima of (method section 3.2)."""
        return self.text.features @ self.smiles.features.T


@dataclass(frozen=True, kw_only=True)
class PairCorrespondence:
    """A text and a molecule with their tokens and their clusters at every aligned level."""

    text: str
    smiles: str
    text_offsets: Offsets
    smiles_offsets: Offsets
    levels: list[LevelCorrespondence]


@torch.no_grad()
def correspondences(
    model: AtomasModel,
    tokenizer: AtomasTokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    max_text_tokens: int,
) -> list[PairCorrespondence]:
    """Of every (text, SMILES), as the model in evaluation mode sees them; longer texts are cut.

    Raises:
        AtomasError: the model has no hierarchy, or cannot read a SMILES of that length.
    """
    if model.alignment is None:
        raise AtomasError(
            "the model has no hierarchy (loss.hierarchical_weight = 0): it has no clusters to show"
        )
    texts = [_cut(*tokenizer.encode_with_offsets(text), max_text_tokens) for text, _ in pairs]
    molecules = [tokenizer.encode_with_offsets(smiles) for _, smiles in pairs]
    text_levels = _levels(model, [ids for ids, _ in texts], "text")
    smiles_levels = _levels(model, [ids for ids, _ in molecules], "smiles")
    return [
        PairCorrespondence(
            text=text,
            smiles=smiles,
            text_offsets=texts[row][1],
            smiles_offsets=molecules[row][1],
            levels=[
                LevelCorrespondence(number=number, text=text_levels[number][row], smiles=level[row])
                for number, level in smiles_levels.items()
            ],
        )
        for row, (text, smiles) in enumerate(pairs)
    ]


def _levels(
    model: AtomasModel, ids: Sequence[Sequence[int]], modality: Modality
) -> dict[int, list[SequenceClusters]]:
    """Per aligned level, the clusters of every sequence."""
    device = next(model.parameters()).device
    levels = model.embed(RaggedTokens.from_lists(ids).to(device), modality).levels
    composed = [np.arange(len(sequence)) for sequence in ids]
    found = {}
    for number, level in enumerate(levels):
        if level.assignment is not None:
            below = levels[number - 1].lengths.tolist()
            steps = [part.cpu().numpy() for part in level.assignment.split(below)]
            composed = [step[cluster] for step, cluster in zip(steps, composed, strict=True)]
        if level.weight is not None:
            found[number] = _split(level, composed)
    return found


def _split(level: Level, composed: list[NDArray[np.int64]]) -> list[SequenceClusters]:
    assert level.weight is not None
    lengths = level.lengths.tolist()
    features = F.normalize(level.tokens.float(), dim=1).split(lengths)
    return [
        SequenceClusters(cluster=cluster, weight=weight.cpu().numpy(), features=feature.cpu().numpy())
        for cluster, weight, feature in zip(
            composed, level.weight.float().split(lengths), features, strict=True
        )
    ]


def _cut(ids: list[int], offsets: Offsets, limit: int) -> tuple[list[int], Offsets]:
    """As in training: the last token, </s>, stays."""
    if len(ids) <= limit:
        return ids, offsets
    end = offsets[limit - 2][1]
    return [*ids[: limit - 1], ids[-1]], [*offsets[: limit - 1], (end, end)]
