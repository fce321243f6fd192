"""Weighted token interaction (method.md 3.2)."""

from typing import Any

import torch
from torch import Tensor

from atomas_kernels import checks
from atomas_kernels.reference.segments import compute_dtype, segment_index

_SIMILARITIES_PER_BLOCK = 1 << 23
"""Entries of a block [T_t, some SMILES]; 32 MiB in float32."""

_SHORTEST = 1e-12


def token_interaction(
    text: Tensor,
    smiles: Tensor,
    text_weight: Tensor,
    smiles_weight: Tensor,
    text_lengths: Tensor,
    smiles_lengths: Tensor,
) -> Tensor:
    """See `atomas_kernels.token_interaction`."""
    text_sizes = checks.segment_sizes("text_lengths", text_lengths, text.shape[0])
    smiles_sizes = checks.segment_sizes("smiles_lengths", smiles_lengths, smiles.shape[0])
    t, s = _normalize(_widen(text)), _normalize(_widen(smiles))
    w, v = text_weight.to(t.dtype), smiles_weight.to(t.dtype)
    if not text_sizes or not smiles_sizes:
        # Nothing to score, but part of the graph as every other result is.
        return t.new_zeros(len(text_sizes), len(smiles_sizes)) + sum(x.sum() for x in (t, s, w, v))

    groups = _group(smiles_sizes, max(1, _SIMILARITIES_PER_BLOCK // max(t.shape[0], 1)))
    token_parts = s.split([sum(group) for group in groups])
    weight_parts = v.split([sum(group) for group in groups])
    scores = [
        _block(t, s_part, w, v_part, text_lengths, text_sizes, group)
        for s_part, v_part, group in zip(token_parts, weight_parts, groups, strict=True)
    ]
    return torch.cat(scores, dim=1)


def _block(
    t: Tensor,
    s: Tensor,
    w: Tensor,
    v: Tensor,
    text_lengths: Tensor,
    text_sizes: list[int],
    smiles_sizes: list[int],
) -> Tensor:
    """Scores [A, c] of all texts against c consecutive SMILES."""
    similarity = t @ s.T
    # `split` (not slicing) keeps the backward linear: each piece's gradient is written once, then
    # concatenated.
    best_smiles = [_maximum(part, dim=1) for part in similarity.split(smiles_sizes, dim=1)]
    text_to_smiles = w[:, None] * torch.stack(best_smiles, dim=1)
    row_sums = t.new_zeros(len(text_sizes), len(smiles_sizes))
    row_sums = row_sums.index_add(0, segment_index(text_lengths), text_to_smiles)

    best_text = [_maximum(part, dim=0) for part in similarity.split(text_sizes, dim=0)]
    smiles_to_text = v * torch.stack(best_text)
    index = segment_index(torch.tensor(smiles_sizes, device=t.device))
    column_sums = t.new_zeros(row_sums.shape).index_add(1, index, smiles_to_text)
    return (row_sums + column_sums) / 2


class _Widen(torch.autograd.Function):
    """Half precision to float32, as `compute_dtype`; the gradient stays float32, for autograd to round or not."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor) -> Tensor:
        return tokens.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _widen(tokens: Tensor) -> Tensor:
    if tokens.dtype not in (torch.bfloat16, torch.float16):
        return compute_dtype(tokens)
    widened: Tensor = _Widen.apply(tokens)
    return widened


def _normalize(tokens: Tensor) -> Tensor:
    """Unit rows; a row shorter than 1e-12 becomes zero with zero gradient, where x / 1e-12 would explode."""
    norm = torch.linalg.vector_norm(tokens, dim=1, keepdim=True)
    short = norm < _SHORTEST
    return (tokens / norm.masked_fill(short, 1)).masked_fill(short, 0)


def _maximum(similarity: Tensor, dim: int) -> Tensor:
    """Largest entry along `dim`, 0 where there is none; the gradient goes to the first of equal entries."""
    if similarity.shape[dim] == 0:
        return similarity.sum(dim=dim)
    return similarity.max(dim=dim).values


def _group(sizes: list[int], limit: int) -> list[list[int]]:
    """Consecutive sequences in groups of at most `limit` tokens; a longer sequence is a group of its own."""
    groups: list[list[int]] = []
    room = 0
    for size in sizes:
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(size)
        room -= size
    return groups
