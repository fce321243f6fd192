"""Momentum contrast: the slow copy of the encoder, its queues, and the global loss (method section 2).

The copy lives outside the engine, in float32 whatever the run's precision: in bf16 a coefficient of 0.995
would round most updates away.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atomas.config import MomentumConfig
from atomas.data.batching import PairBatch
from atomas.distributed.collectives import rank, world_size
from atomas.distributed.gather import gather_rows
from atomas.model.encoder import DualEncoder
from atomas.model.layers import full_precision
from atomas_kernels import contrastive_cross_entropy, momentum_update


@dataclass(frozen=True, kw_only=True)
class Identities:
    """What n pairs are, so that equal ones are not taken for negatives."""

    text: Tensor
    """[n] int64, equal for equal texts; -1 matches nothing"""
    molecule: Tensor
    """[n] int64, equal for equal molecules; -1 matches nothing"""

    @classmethod
    def of_all_ranks(cls, batch: PairBatch) -> "Identities":
        """The B pairs of all ranks, in rank order."""
        both = gather_rows(
            torch.stack([batch.text_id, batch.molecule_id], dim=1),
            [len(batch)] * world_size(),
            what="identities",
        )
        return cls(text=both[:, 0], molecule=both[:, 1])

    def shared_with(self, other: "Identities") -> Tensor:
        """[n, m] bool: True where two pairs have the same text or the same molecule."""
        return (self.text[:, None] == other.text) | (self.molecule[:, None] == other.molecule)

    def __getitem__(self, rows: slice | Tensor) -> "Identities":
        """Some of the pairs, by a slice or by their numbers."""
        return Identities(text=self.text[rows], molecule=self.molecule[rows])


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
    def of_all_ranks(cls, text: Tensor, smiles: Tensor, identities: Identities) -> "Keys":
        """Features [b, D] of this rank's pairs -> those of all ranks, in rank order, with gradient."""
        both = gather_rows(
            torch.cat([text, smiles], dim=1), [len(text)] * world_size(), what="global features"
        )
        text, smiles = both.chunk(2, dim=1)
        return cls(text=text, smiles=smiles, identities=identities)


@dataclass(frozen=True, kw_only=True)
class MomentumTargets:
    """What the momentum encoder contributes to the loss of one batch."""

    text: Tensor
    """[b, D] features of this rank's texts"""
    smiles: Tensor
    """[b, D] features of this rank's molecules"""
    keys: Keys
    """The B pairs of all ranks, in rank order"""
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


class Momentum(nn.Module):
    """The slow encoder and the queues. Its parameters have the names they have in `AtomasModel`."""

    def __init__(
        self, encoder: DualEncoder, config: MomentumConfig, *, autocast: torch.dtype | None = None
    ) -> None:
        """Copy the online `encoder` as it is; `autocast` is the dtype of the copy's forward."""
        super().__init__()
        self.encoder = copy.deepcopy(encoder).float().requires_grad_(False)
        self.queue = FeatureQueue(config.queue_size, encoder.backbone.width)
        self.coefficient = config.coefficient
        self.autocast = autocast
        self.eval()

    def train(self, mode: bool = True) -> "Momentum":
        """Stay in evaluation mode: momentum features are computed without dropout."""
        return super().train(False)

    @torch.no_grad()
    def update(self, sources: Mapping[str, Tensor]) -> None:
        """theta_m <- m theta_m + (1 - m) theta, before the momentum features of a step are computed.

        `sources` holds the online parameters under their names in `AtomasModel`, best in float32; names that
        are not of the encoder are ignored, a missing one is a KeyError.
        """
        own = dict(self.named_parameters())
        momentum_update(list(own.values()), [sources[name] for name in own], self.coefficient)

    @torch.no_grad()
    def targets(self, batch: PairBatch) -> MomentumTargets:
        """Features of this rank's b pairs, the keys of all ranks, and the queue.

        Collective: every rank calls it with the same b.
        """
        kind = batch.text.ids.device.type
        with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            text, smiles = self.encoder.features(batch)
        fresh = Keys.of_all_ranks(text, smiles, Identities.of_all_ranks(batch))
        return MomentumTargets(text=text, smiles=smiles, keys=fresh, queue=self.queue.keys())

    @torch.no_grad()
    def enqueue(self, batch: PairBatch, targets: MomentumTargets) -> None:
        """Put the keys that `targets` made of `batch` into the queue. Collective.

        After the backward pass of the batch, which reads the queue as the forward pass did. In the order of the
        corpus, not of the ranks: when the queue wraps, what leaves it must not depend on the world size.
        """
        numbers = gather_rows(batch.sample_id, [len(batch)] * world_size(), what="sample numbers")
        self.queue.push(targets.keys[numbers.argsort(stable=True)])


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
    temperature: Tensor,
    *,
    alpha: float,
    ignore: Tensor | None,
) -> Tensor:
    """L_ga over this rank's rows, both directions averaged; its mean over ranks is that of the global batch.

    Args:
        text: [b, D] online features of the texts.
        smiles: [b, D] online features of the molecules.
        targets: momentum features and keys.
        temperature: [1].
        alpha: share of the soft targets.
        ignore: [b, M + Q] bool, True leaves a key out; None keeps all.
    """
    positive = own_columns(text)
    keys, queue, dtype = targets.keys, targets.queue, text.dtype

    def direction(query: Tensor, momentum_query: Tensor, fresh: Tensor, queued: Tensor | None) -> Tensor:
        return contrastive_cross_entropy(
            query,
            momentum_query.to(dtype),
            fresh.to(dtype),
            positive,
            temperature,
            alpha=alpha,
            queue=queued,
            ignore=ignore,
        )

    with full_precision(text.device):
        text_to_smiles = direction(text, targets.text, keys.smiles, None if queue is None else queue.smiles)
        smiles_to_text = direction(smiles, targets.smiles, keys.text, None if queue is None else queue.text)
    return (text_to_smiles + smiles_to_text) / 2


def own_columns(rows: Tensor) -> Tensor:
    """[b] int64: the place of this rank's rows among the gathered rows of all ranks."""
    return torch.arange(len(rows), device=rows.device) + rank() * len(rows)
