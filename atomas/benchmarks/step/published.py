"""The published form of the whole step, written plainly: everything padded, eager, every intermediate held.

What it does, wrong or wasteful as it is, is the left column of the table at the end of the method: all sequences
padded to one length, two encoder passes, importance softmax and clusters over padding, [B, B, N, N] similarities,
logits of all padded positions, a queue that is cloned each step, a momentum copy in the training dtype. Where every
sequence has the full length it computes what Atomas computes. Parameters have the published names, so that
`atomas.model.authors` translates them.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from atomas.benchmarks.step.published_hierarchy import (
    MergedAttention,
    TokenMerge,
    symmetric_info_nce,
    token_interaction,
)
from atomas.data.batching import PairBatch, RaggedTokens

ALPHA, MOMENTUM, LM_WEIGHT = 0.4, 0.995, 10.0
TEMPERATURE, LOGIT_SCALE = 0.07, 1 / 0.07
HEADS = 8
RATIOS = (0.25, 0.5)
IGNORED = -100
"""Label of padding."""


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """B pairs, both sides padded to N places."""

    text: Tensor
    """[B, N] int64, 0 at padding"""
    smiles: Tensor
    text_mask: Tensor
    """[B, N] floating, 1 at tokens"""
    smiles_mask: Tensor

    @classmethod
    def of(cls, batch: PairBatch, length: int, dtype: torch.dtype = torch.float32) -> "PaddedBatch":
        """Pad both sides to `length`, cutting what is longer, as the published tokenisation does.

        `dtype` is that of the masks: the model's.
        """
        text, text_mask = _padded(batch.text, length)
        smiles, smiles_mask = _padded(batch.smiles, length)
        return cls(text=text, smiles=smiles, text_mask=text_mask.to(dtype), smiles_mask=smiles_mask.to(dtype))


def _padded(tokens: RaggedTokens, length: int) -> tuple[Tensor, Tensor]:
    ids = tokens.ids.new_zeros(len(tokens.lengths), length)
    mask = torch.zeros(ids.shape, device=ids.device)
    for row, sequence in enumerate(tokens.ids.split(tokens.lengths.tolist())):
        kept = sequence[:length]
        ids[row, : len(kept)] = kept
        mask[row, : len(kept)] = 1
    return ids, mask


class PublishedModel(nn.Module):
    """Text to SMILES, aligned globally and on three levels."""

    text_linear_m: nn.Linear
    smiles_linear_m: nn.Linear

    def __init__(self, t5: T5Config, *, length: int, queue_size: int, tie_noise: float = 1e-6) -> None:
        """Random weights. `tie_noise` is the random part of densities, 0 to repeat."""
        super().__init__()
        t5._attn_implementation = "eager"
        width = t5.d_model
        self.length = length
        self.molt5 = T5ForConditionalGeneration(t5)
        self.text_linear = nn.Linear(length, 1)
        self.smiles_linear = nn.Linear(length, 1)
        for name in ("molt5", "text_linear", "smiles_linear"):
            setattr(self, f"{name}_m", copy.deepcopy(getattr(self, name)).requires_grad_(False))
        for level in range(len(RATIOS) + 1):
            for modality in ("text", "smiles"):
                mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))
                setattr(self, f"{modality}_weight_fc_{level}", mlp)
        for level, ratio in enumerate(RATIOS, start=1):
            for modality in ("t", "s"):
                setattr(self, f"{modality}_ctm{level}", TokenMerge(width, ratio, tie_noise))
                setattr(self, f"{modality}_block{level}", MergedAttention(width, HEADS))
        self.temp = nn.Parameter(torch.tensor(TEMPERATURE))
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE).log())
        self.text_queue: Tensor
        self.smiles_queue: Tensor
        self.queue_ptr: Tensor
        self.register_buffer("text_queue", F.normalize(torch.randn(width, queue_size), dim=0))
        self.register_buffer("smiles_queue", F.normalize(torch.randn(width, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def forward(self, batch: PaddedBatch) -> dict[str, Tensor]:
        """The losses under our names; updates the momentum copy and the queues, as the published forward does."""
        text = self._encode(self.molt5, batch.text, batch.text_mask)
        smiles = self._encode(self.molt5, batch.smiles, batch.smiles_mask)
        losses = {
            "loss/global": self._global(batch, text, smiles),
            "loss/hierarchical": self._hierarchical(batch, text, smiles),
            "loss/lm": self._language_model(batch, text),
        }
        total = losses["loss/global"] + losses["loss/hierarchical"] + LM_WEIGHT * losses["loss/lm"]
        return {"loss": total, **{name: value.detach() for name, value in losses.items()}}

    def _encode(self, t5: Any, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = t5.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states

    def _global(self, batch: PaddedBatch, text: Tensor, smiles: Tensor) -> Tensor:
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
            self._update_momentum()
            text_m = _pool(self.text_linear_m, self._encode(self.molt5_m, batch.text, batch.text_mask))
            smiles_m = _pool(
                self.smiles_linear_m, self._encode(self.molt5_m, batch.smiles, batch.smiles_mask)
            )
            text_keys = torch.cat([text_m.T, self.text_queue.clone()], dim=1)
            smiles_keys = torch.cat([smiles_m.T, self.smiles_queue.clone()], dim=1)
        forth = self._soft_cross_entropy(_pool(self.text_linear, text), text_m, smiles_keys)
        back = self._soft_cross_entropy(_pool(self.smiles_linear, smiles), smiles_m, text_keys)
        self._enqueue(text_m, smiles_m)
        return (forth + back) / 2

    def _soft_cross_entropy(self, query: Tensor, query_m: Tensor, keys: Tensor) -> Tensor:
        with torch.no_grad():
            own = torch.zeros(len(query), keys.shape[1], device=keys.device, dtype=keys.dtype)
            own.fill_diagonal_(1)
            targets = ALPHA * (query_m @ keys / self.temp).softmax(dim=1) + (1 - ALPHA) * own
        logits = query @ keys / self.temp
        return -(logits.log_softmax(dim=1) * targets).sum(dim=1).mean()

    def _hierarchical(self, batch: PaddedBatch, text: Tensor, smiles: Tensor) -> Tensor:
        masks: tuple[Tensor, Tensor] | None = (batch.text_mask, batch.smiles_mask)
        total = torch.zeros((), device=text.device)
        for level in range(len(RATIOS) + 1):
            if level:
                text = self._merge("t", level, text, masks and masks[0])
                smiles = self._merge("s", level, smiles, masks and masks[1])
                masks = None
            weights = [
                getattr(self, f"{modality}_weight_fc_{level}")(tokens).squeeze(2).softmax(dim=1)
                for modality, tokens in (("text", text), ("smiles", smiles))
            ]
            scores = token_interaction(text, smiles, weights[0], weights[1], masks)
            total = total + symmetric_info_nce(scores, self.logit_scale.exp())
        return total

    def _merge(self, modality: str, level: int, tokens: Tensor, mask: Tensor | None) -> Tensor:
        merged = getattr(self, f"{modality}_ctm{level}")(tokens, mask)
        output: Tensor = getattr(self, f"{modality}_block{level}")(*merged)
        return output

    def _language_model(self, batch: PaddedBatch, text: Tensor) -> Tensor:
        labels = batch.smiles.masked_fill(batch.smiles_mask == 0, IGNORED)
        loss: Tensor = self.molt5(encoder_outputs=(text,), attention_mask=batch.text_mask, labels=labels).loss
        return loss

    def momentum_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter of the momentum copy, which is of the whole T5, and its source."""
        for name in ("molt5", "text_linear", "smiles_linear"):
            copied, source = getattr(self, f"{name}_m"), getattr(self, name)
            yield from zip(copied.parameters(), source.parameters(), strict=True)

    def _update_momentum(self) -> None:
        for copied, source in self.momentum_pairs():
            copied.data = copied.data * MOMENTUM + source.data * (1 - MOMENTUM)

    def _enqueue(self, text: Tensor, smiles: Tensor) -> None:
        place, size = int(self.queue_ptr), self.text_queue.shape[1]
        self.text_queue[:, place : place + len(text)] = text.T
        self.smiles_queue[:, place : place + len(smiles)] = smiles.T
        self.queue_ptr[0] = (place + len(text)) % size


def _pool(linear: nn.Linear, states: Tensor) -> Tensor:
    """[B, N, D] -> [B, D]: a weight per position, padded or not."""
    return F.normalize(linear(states.transpose(1, 2)).squeeze(2), dim=1)
