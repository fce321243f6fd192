"""How much of a step is computed where no token stands: in attention alone, and on accelerators alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atomas.config import Config
from atomas.data.batching import token_passes
from atomas_kernels.reference.attention import attention_slots

Slots = tuple[int, int]
"""Tokens, and the slots that they take."""


def count_slots(text: Tensor, smiles: Tensor, config: Config, device: torch.device) -> Slots:
    """Tokens and slots of the attentions of encoder and decoder, of one layer each, for a batch encoded at once.

    `text` and `smiles` are the lengths [b] of its pairs.
    """
    budget = config.data.token_budget
    found = [_attended(each, each, each, budget, device) for each in (text, smiles)]
    if config.loss.lm_weight > 0:
        task = config.loss.task
        directions = [(text, smiles)] * (task in ("genmol", "both")) + [(smiles, text)] * (
            task in ("gentext", "both")
        )
        for read, written in directions:
            found.append(_attended(written, written, read + written, budget, device))
            found.append(_attended(written, read, read + written, budget, device))
    return sum(tokens for tokens, _ in found), sum(slots for _, slots in found)


def _attended(queries: Tensor, keys: Tensor, lengths: Tensor, budget: int, device: torch.device) -> Slots:
    passes: Sequence[int] = token_passes(lengths.tolist(), budget)
    parts = zip(queries.split(passes), keys.split(passes), strict=True)
    slots = sum(attention_slots(own, others, device) for own, others in parts)
    return int(queries.sum() + keys.sum()), slots
