"""The part of the model that also exists as a momentum copy: backbone and poolers (method section 2)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atomas.data.batching import PairBatch, RaggedTokens
from atomas.model.backbone import Backbone
from atomas.model.layers import full_precision

Modality = Literal["text", "smiles"]


class DualEncoder(nn.Module):
    """One T5 for both modalities, and a pooler for each."""

    def __init__(self, backbone: Backbone, *, text_pooler: nn.Module, smiles_pooler: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.text_pooler = text_pooler
        self.smiles_pooler = smiles_pooler

    def states(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Encoder states [T_t, D] of the texts and [T_s, D] of the SMILES, from one pass over both."""
        both = RaggedTokens(
            ids=torch.cat([batch.text.ids, batch.smiles.ids]),
            lengths=torch.cat([batch.text.lengths, batch.smiles.lengths]),
        )
        text, smiles = self.backbone.encode(both).split([len(batch.text.ids), len(batch.smiles.ids)])
        return text, smiles

    def pool(self, states: Tensor, lengths: Tensor, modality: Modality) -> Tensor:
        """Global features [B, D], L2-normalised, of B sequences with states [T, D]."""
        pooler: Any = self.text_pooler if modality == "text" else self.smiles_pooler
        with full_precision(states.device):
            return F.normalize(pooler(states, lengths), dim=1)

    def features(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Global features [b, D] of the texts and of the SMILES."""
        text, smiles = self.states(batch)
        return (
            self.pool(text, batch.text.lengths, "text"),
            self.pool(smiles, batch.smiles.lengths, "smiles"),
        )
