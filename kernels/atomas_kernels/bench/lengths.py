"""Token lengths like those of molecule captions and SMILES."""

import math

import torch
from torch import Tensor

LENGTHS: dict[str, tuple[float, float, int]] = {"text": (106, 0.45, 512), "smiles": (53, 0.5, 512)}
"""Log-normal, clipped: mean, sigma of the logarithm and longest; the means are those of ChEBI-20 in T5 tokens."""


def draw(modality: str, count: int, seed: int) -> Tensor:
    """[count] int64 lengths."""
    mean, sigma, longest = LENGTHS[modality]
    generator = torch.Generator().manual_seed(2 * seed + (modality == "smiles"))
    normal = torch.randn(count, generator=generator)
    values = torch.exp(normal * sigma) * mean * math.exp(-(sigma**2) / 2)
    return values.round().clamp(2, longest).long()
