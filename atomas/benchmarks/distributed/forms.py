"""Four ways to compute the hierarchical loss of a global batch on several ranks. They give the same loss.

Each function takes this rank's b pairs and returns a loss whose mean over ranks is that of the global batch.

- `allgather`, `ring`: ours. Own pairs are clustered, the smaller modality travels, and each rank scores [b, B].
- `gather_everything`: the published form. Encoder states of both modalities are gathered; every rank clusters all B
  pairs and scores [B, B]. (The published gather loses the gradient of other ranks; here it is exact.)
- `local_loss`: as open_clip does with `local_loss` and `gather_with_grad` (Cherti et al. 2023, arXiv 2212.07143).
  Own pairs are clustered, both modalities travel, and each rank scores [b, B] twice: its texts, and its molecules.

States have the precision of a run, and so have the tokens of the interaction. Weights of the heads are float32 in
every precision, so that all forms round alike.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atomas.config import LossConfig, ModelConfig
from atomas.distributed.gather import gather_rows
from atomas.distributed.partition import Partition
from atomas.model.alignment import (
    HierarchicalAlignment,
    Level,
    gather_lengths,
    interaction,
    scores_with_all,
)
from atomas.model.global_batch import GlobalBatch, Identities
from atomas_kernels import info_nce

FORMS = ("allgather", "ring", "gather_everything", "local_loss")


class Pairs(NamedTuple):
    """Encoder states of b pairs."""

    text: Tensor
    """[T_t, D] in the precision of the run; differentiable"""
    smiles: Tensor
    """[T_s, D], as `text`; differentiable"""
    text_lengths: Tensor
    """[b] int64"""
    smiles_lengths: Tensor
    """[b] int64"""


def build_alignment(form: str, width: int) -> HierarchicalAlignment:
    """The heads of all three levels; every form has the same weights."""
    torch.manual_seed(0)
    loss = LossConfig(false_negatives="keep", exchange="ring" if form == "ring" else "allgather")
    return HierarchicalAlignment(width, ModelConfig(d_model=width), loss)


def global_batch(pairs: Pairs) -> GlobalBatch:
    """What all ranks know of each other's pairs, which are all different. Collective."""
    partition = Partition.of(len(pairs.text_lengths), pairs.text.device)
    numbers = torch.arange(partition.total, device=pairs.text.device)
    return GlobalBatch(
        partition=partition,
        identities=Identities(text=numbers, molecule=numbers),
        sample_id=numbers,
        text_tokens=0,
        smiles_tokens=0,
    )


def loss_of(form: str, alignment: HierarchicalAlignment, pairs: Pairs, everyone: GlobalBatch) -> Tensor:
    """Scalar with gradient, see the module. Collective."""
    if form == "gather_everything":
        return _gather_everything(alignment, pairs, everyone.partition)
    text, smiles = levels_of(alignment, pairs)
    if form == "local_loss":
        return _local_loss(alignment, text, smiles, everyone)
    return alignment(text, smiles, everyone)["loss/hierarchical"]


def levels_of(alignment: HierarchicalAlignment, pairs: Pairs) -> tuple[list[Level], list[Level]]:
    """Levels of texts and SMILES, with tokens in the precision of the states."""
    sides = (
        alignment.text(pairs.text, pairs.text_lengths),
        alignment.smiles(pairs.smiles, pairs.smiles_lengths),
    )
    text, smiles = (
        [level._replace(tokens=level.tokens.to(pairs.text.dtype)) for level in side] for side in sides
    )
    return text, smiles


def _gather_everything(alignment: HierarchicalAlignment, pairs: Pairs, partition: Partition) -> Tensor:
    lengths = [
        gather_rows(own, partition.sizes, what="lengths")
        for own in (pairs.text_lengths, pairs.smiles_lengths)
    ]
    states = [
        gather_rows(
            own, [int(part.sum()) for part in all_lengths.split(list(partition.sizes))], what="states"
        )
        for own, all_lengths in zip((pairs.text, pairs.smiles), lengths, strict=True)
    ]
    text, smiles = levels_of(alignment, Pairs(*states, *lengths))
    scale = alignment.scale()
    parts = [
        weight * info_nce(interaction(text[number], smiles[number]), scale, negative_mask=None)
        for number, weight in alignment.level_weights.items()
    ]
    return torch.stack(parts).sum()


def _local_loss(
    alignment: HierarchicalAlignment, text: list[Level], smiles: list[Level], everyone: GlobalBatch
) -> Tensor:
    partition, scale = everyone.partition, alignment.scale()
    levels = {number: (text[number], smiles[number]) for number in alignment.level_weights}
    lengths = gather_lengths({n: (each[0].lengths, each[1].lengths) for n, each in levels.items()}, everyone)
    own = torch.arange(partition.own.start, partition.own.stop, device=scale.device)
    parts = []
    for number, weight in alignment.level_weights.items():
        each, of_all, what = levels[number], lengths[number], f"tokens of level {number}"
        forth = scores_with_all(each[0], each[1], of_all[1], partition, what=what)
        back = scores_with_all(each[1], each[0], of_all[0], partition, what=what)
        parts.append(weight * (F.cross_entropy(forth * scale, own) + F.cross_entropy(back * scale, own)) / 2)
    return torch.stack(parts).sum()
