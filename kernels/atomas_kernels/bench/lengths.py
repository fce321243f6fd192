"""Token lengths like those of ChEBI-20."""

import math

import torch
from torch import Tensor

LENGTHS: dict[str, tuple[float, float, int]] = {"text": (101.4, 0.402, 512), "smiles": (53.9, 0.784, 512)}
"""Median, sigma of the logarithm and longest of a log-normal distribution, by modality.

Fitted to the 3,301 rows of the ChEBI-20 validation split in T5 tokens, end of sequence included (real / drawn):
texts have the mean 110 / 110, median 101 / 101 and 95 % quantile 198 / 196; SMILES the mean 73 / 73, median
52 / 54 and 95 % quantile 194 / 195, when the 0.7 % above 512 are cut, as the published form does.
"""

_RATIOS = (0.25, 0.5)
"""Clusters per token from level to level: tokens, fragments, molecules."""


def draw(modality: str, count: int, seed: int, level: int = 0) -> Tensor:
    """[count] int64 lengths of sequences after `level` clusterings, in random order.

    Stratified: one from each of `count` equal shares of the distribution, so that small batches have its mean
    too.
    """
    median, sigma, longest = LENGTHS[modality]
    generator = torch.Generator().manual_seed(2 * seed + (modality == "smiles"))
    shares = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    normal = torch.special.ndtri((shares.double() / max(count, 1)).clamp(1e-6, 1 - 1e-6))
    lengths = (median * (sigma * normal).exp()).round().clamp(2, longest)
    return after_clustering(lengths.long(), level)


def after_clustering(lengths: Tensor, level: int) -> Tensor:
    """Lengths after the first `level` clusterings."""
    for ratio in _RATIOS[:level]:
        lengths = torch.ceil(lengths.double() * ratio).long()
    return lengths


def published_length(level: int) -> int:
    """What the published form pads to: 512, and what clustering makes of it."""
    return math.ceil(512 * math.prod(_RATIOS[:level]))
