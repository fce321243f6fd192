"""Momentum contrast: keys, queues, and the global loss (method section 2). The slow encoder: `momentum_encoder`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atomas.distributed.gather import gather_rows
from atomas.distributed.own_block import FalseNegatives
from atomas.model.global_batch import GlobalBatch, Identities
from atomas.model.layers import full_precision
from atomas.phases import phase
from atomas_kernels import contrastive_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What a query is contrasted with: M features of each modality."""

    text: Tensor
    """[M, D], L2-normalised"""
    smiles: Tensor
    """[M, D], L2-normalised"""
    identities: Identities
    """of the M pairs"""

    def __getitem__(self, rows: slice | Tensor) -> "Keys":
        """Some of the keys, by a slice or by their numbers."""
        return Keys(text=self.text[rows], smiles=self.smiles[rows], identities=self.identities[rows])

    @classmethod
    def of_all_ranks(cls, text: Tensor, smiles: Tensor, everyone: GlobalBatch) -> "Keys":
        """Features [b, D] of this rank's pairs -> those of all ranks, in rank order, with gradient."""
        sizes = everyone.partition.sizes
        both = gather_rows(torch.cat([text, smiles], dim=1), sizes, what="global features")
        text, smiles = both.chunk(2, dim=1)
        return cls(text=text, smiles=smiles, identities=everyone.identities)


@dataclass(frozen=True, kw_only=True)
class MomentumTargets:
    """What the momentum encoder contributes to the loss of one batch."""

    text: Tensor
    """[b, D] features of this rank's texts"""
    smiles: Tensor
    """[b, D] features of this rank's molecules"""
    keys: Keys
    """The B pairs of all ranks, in rank order"""
    everyone: GlobalBatch
    """What these pairs are"""
    queue: Keys | None = None
    """Pairs of earlier batches, read where the queue holds them: enqueue after the backward pass"""

    @property
    def identities(self) -> Identities:
        """Of the keys, then of the queue."""
        if self.queue is None:
            return self.keys.identities
        parts = (self.keys.identities, self.queue.identities)
        return Identities(
            text=torch.cat([part.text for part in parts]),
            molecule=torch.cat([part.molecule for part in parts]),
        )


class FeatureQueue(nn.Module):
    """The last Q features of each modality, first in first out; fed with gathered rows, alike on all ranks.

    It starts empty and counts what it holds; the published one starts full of random features.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.text: Tensor
        self.smiles: Tensor
        self.text_id: Tensor
        self.molecule_id: Tensor
        self.register_buffer("text", torch.zeros(size, width))
        self.register_buffer("smiles", torch.zeros(size, width))
        self.register_buffer("text_id", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("molecule_id", torch.full((size,), -1, dtype=torch.int64))
        self.cursor = 0
        self.filled = 0

    def keys(self) -> Keys:
        """Views of the filled entries, in no particular order."""
        n = self.filled
        identities = Identities(text=self.text_id[:n], molecule=self.molecule_id[:n])
        return Keys(text=self.text[:n], smiles=self.smiles[:n], identities=identities)

    def push(self, keys: Keys) -> None:
        """Replace the oldest entries; of more keys than the queue holds, the last ones stay."""
        size, count = len(self.text), len(keys.text)
        kept = min(size, count)
        if not kept:
            return
        slots = (torch.arange(kept, device=self.text.device) + self.cursor + count - kept) % size
        self.text[slots] = keys.text[-kept:].to(self.text.dtype)
        self.smiles[slots] = keys.smiles[-kept:].to(self.smiles.dtype)
        self.text_id[slots] = keys.identities.text[-kept:]
        self.molecule_id[slots] = keys.identities.molecule[-kept:]
        self.cursor = (self.cursor + count) % size
        self.filled = min(size, self.filled + count)

    def get_extra_state(self) -> dict[str, int]:
        """Part of `state_dict`: where the next entry goes, and how many are filled."""
        return {"cursor": self.cursor, "filled": self.filled}

    def set_extra_state(self, state: Any) -> None:
        """Counterpart of `get_extra_state`."""
        self.cursor, self.filled = int(state["cursor"]), int(state["filled"])


def global_loss(
    text: Tensor,
    smiles: Tensor,
    targets: MomentumTargets,
    positive: Tensor,
    temperature: Tensor,
    *,
    alpha: float,
    false_negatives: FalseNegatives,
) -> Tensor:
    """L_ga over some pairs, both directions averaged (method section 2).

    Pairs that share a text or a molecule are treated as `OwnBlock` says; with `multi_positive` they share the
    (1 - alpha) of the target equally.

    Args:
        text: [n, D] online features of the texts.
        smiles: [n, D] online features of the molecules.
        targets: momentum features of the same n pairs, and the keys.
        positive: [n] int64, number of each pair among the keys.
        temperature: [1].
        alpha: share of the soft targets.
        false_negatives: what is done with pairs that are no true negatives.

    Returns:
        Scalar, mean over the n pairs.
    """
    keys, queue, dtype = targets.keys, targets.queue, text.dtype
    related = None
    if false_negatives != "keep":
        related = keys.identities[positive].related_to(targets.identities)
    ignore = related if false_negatives == "mask" else None

    def direction(query: Tensor, momentum_query: Tensor, fresh: Tensor, queued: Tensor | None) -> Tensor:
        fresh = fresh.to(dtype)
        loss = contrastive_cross_entropy(
            query,
            momentum_query.to(dtype),
            fresh,
            positive,
            temperature,
            alpha=alpha,
            queue=queued,
            ignore=ignore,
        )
        if false_negatives == "multi_positive":
            assert related is not None
            own = _logits(query, fresh, queued, torch.arange(len(query), device=query.device), positive)
            rows, columns = related.scatter(1, positive[:, None], True).nonzero(as_tuple=True)
            logits = _logits(query, fresh, queued, rows, columns)
            mean = torch.zeros_like(own).index_add(0, rows, logits) / rows.bincount(minlength=len(own))
            loss = loss + (1 - alpha) * (own - mean).mean() / temperature[0]
        return loss

    with phase("contrastive"), full_precision(text.device):
        text_to_smiles = direction(text, targets.text, keys.smiles, None if queue is None else queue.smiles)
        smiles_to_text = direction(smiles, targets.smiles, keys.text, None if queue is None else queue.text)
    return (text_to_smiles + smiles_to_text) / 2


def _logits(query: Tensor, keys: Tensor, queue: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
    """[n] inner products of the queries `rows` [n] with the keys, followed by the queue, numbered `columns` [n]."""
    fresh = columns < len(keys)
    picked = keys[columns.where(fresh, 0)]
    if queue is not None and len(queue):
        queued = queue[(columns - len(keys)).clamp(min=0)].to(keys.dtype)
        picked = picked.where(fresh[:, None], queued)
    return (query[rows] * picked).sum(1)
