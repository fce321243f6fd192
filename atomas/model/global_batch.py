"""What every rank knows of the global batch: which pairs are in it, on which rank, and how long they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from atomas.data.batching import PairBatch
from atomas.distributed.collectives import all_gather_rows
from atomas.distributed.partition import Partition


@dataclass(frozen=True, kw_only=True)
class Identities:
    """What n pairs are, so that equal ones are not taken for negatives."""

    text: Tensor
    """[n] int64, not negative, equal for equal texts"""
    molecule: Tensor
    """[n] int64, not negative, equal for equal molecules"""

    def related_to(self, other: "Identities") -> Tensor:
        """[n, m] bool: True where two pairs have the same text or the same molecule."""
        return (self.text[:, None] == other.text) | (self.molecule[:, None] == other.molecule)

    def __getitem__(self, rows: slice | Tensor) -> "Identities":
        """Some of the pairs, by a slice or by their numbers."""
        return Identities(text=self.text[rows], molecule=self.molecule[rows])


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """The B pairs of all ranks, in rank order."""

    partition: Partition
    identities: Identities
    """of the B pairs"""
    sample_id: Tensor
    """[B] int64, index of the record in its split"""
    text_tokens: int
    """Tokens of all texts"""
    smiles_tokens: int
    """Tokens of all SMILES"""

    @classmethod
    def of(cls, batch: PairBatch) -> "GlobalBatch":
        """Collective; every rank must hold at least one pair."""
        partition = Partition.of(len(batch), batch.sample_id.device)
        columns = (
            batch.text_id,
            batch.molecule_id,
            batch.sample_id,
            batch.text.lengths,
            batch.smiles.lengths,
        )
        everyone = all_gather_rows(torch.stack(columns, dim=1), partition.sizes, "identities and lengths")
        text_tokens, smiles_tokens = everyone[:, 3:].sum(0).tolist()
        return cls(
            partition=partition,
            identities=Identities(text=everyone[:, 0], molecule=everyone[:, 1]),
            sample_id=everyone[:, 2],
            text_tokens=text_tokens,
            smiles_tokens=smiles_tokens,
        )

    @property
    def own_identities(self) -> Identities:
        """Of this rank's b pairs."""
        return self.identities[self.partition.own]

    def related(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[n, m] bool: whether the pairs numbered `rows` and `columns` share a text or a molecule."""
        return self.identities[rows].related_to(self.identities[columns])
