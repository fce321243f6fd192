"""Plain PyTorch in the place of what Atomas does otherwise, for ragged batches: the same numbers, nothing saved."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from atomas.data.batching import PairBatch
from atomas.model.backbone import Backbone
from atomas.model.encoder import DualEncoder


class PaddedBackbone(Backbone):
    """The encoder and decoder of transformers, eager, on sequences padded to `length` or to the longest of a batch."""

    length: int | None = None

    @classmethod
    def around(cls, backbone: Backbone, length: int | None) -> "PaddedBackbone":
        """The same weights."""
        padded = cls(
            backbone.t5,
            token_budget=backbone.token_budget,
            activation_checkpointing=backbone.activation_checkpointing,
        )
        padded.length = length
        for stack in (padded.t5, padded.t5.encoder, padded.t5.decoder):
            stack.config._attn_implementation = "eager"
        return padded

    def _run(
        self, stack: Any, part: tuple[Tensor, Tensor], read: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """As `Backbone._run`: flat in, flat out, padded between."""
        mask = self._mask(*part)
        source = {}
        if read is not None:
            read_mask = self._mask(*read)
            source = {
                "encoder_hidden_states": _pad(read[0], read_mask),
                "encoder_attention_mask": read_mask.long(),
            }
        outputs = stack(input_ids=_pad(part[0], mask), attention_mask=mask.long(), use_cache=False, **source)
        states: Tensor = outputs.last_hidden_state
        return states[mask]

    def _mask(self, flat: Tensor, lengths: Tensor) -> Tensor:
        """[B, N] bool, True at tokens."""
        places = int(lengths.max()) if self.length is None else self.length
        return torch.arange(places, device=flat.device) < lengths.to(flat.device)[:, None]


class TwoPassEncoder(DualEncoder):
    """The texts, and then the SMILES."""

    def states(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """As `DualEncoder.states`."""
        return self.backbone.encode(batch.text), self.backbone.encode(batch.smiles)


def lm_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=ignore_index)


def token_interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
) -> Tensor:
    """Similarities [A, Bc, N_t, N_s] of tokens padded to the longest, -inf at padding."""
    t, s = (_rows(F.normalize(x, dim=1), n) for x, n in ((text, text_lengths), (smiles, smiles_lengths)))
    w, v = _rows(text_weight, text_lengths), _rows(smiles_weight, smiles_lengths)
    text_mask, smiles_mask = (
        _rows(torch.ones(int(n.sum()), device=n.device), n).bool() for n in (text_lengths, smiles_lengths)
    )
    similarity = torch.einsum("atd,bsd->abts", t, s)
    best_smiles = similarity.masked_fill(~smiles_mask[None, :, None, :], -torch.inf).amax(dim=3)
    best_text = similarity.masked_fill(~text_mask[:, None, :, None], -torch.inf).amax(dim=2)
    return (torch.einsum("abt,at->ab", best_smiles, w) + torch.einsum("abs,bs->ab", best_text, v)) / 2


@torch.no_grad()
def momentum_update(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    """Tensor after tensor, with two temporaries each."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(target * momentum + source * (1 - momentum))


def loop_adamw(optimizer: Any) -> None:
    """Let AdamW step tensor after tensor, operation after operation."""
    for group in optimizer.param_groups:
        group |= {"fused": False, "foreach": False}


def _rows(flat: Tensor, lengths: Tensor) -> Tensor:
    """[T, ...] -> [B, N, ...], zero at padding."""
    return pad_sequence(list(flat.split(lengths.tolist())), batch_first=True)


def _pad(flat: Tensor, mask: Tensor) -> Tensor:
    """[T, ...] -> [B, N, ...], zero at padding, which `mask` is False at."""
    padded = flat.new_zeros(*mask.shape, *flat.shape[1:])
    return padded.index_put((mask,), flat)
