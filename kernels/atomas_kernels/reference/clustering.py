"""Adaptive polymerisation: density-peak clustering and merging (method.md 3.1)."""

import torch
from torch import Tensor

from atomas_kernels import checks
from atomas_kernels.reference.segments import compute_dtype, segment_index

_WEIGHT_FLOOR = 1e-6
_ROUNDING = 1e-13


def dpc_knn(tokens: Tensor, lengths: Tensor, *, ratio: float, k: int) -> tuple[Tensor, Tensor]:
    """See `atomas_kernels.dpc_knn`."""
    sizes = checks.segment_sizes("lengths", lengths, tokens.shape[0])
    counts = cluster_counts(lengths, ratio)
    parts = tokens.split(sizes)
    labels = [cluster_one(x, clusters, k) for x, clusters in zip(parts, counts.tolist(), strict=True)]
    assignment = torch.cat(labels) if labels else lengths.new_empty(0)
    return assignment, counts


def cluster_counts(lengths: Tensor, ratio: float) -> Tensor:
    """K_i = ceil(ratio * N_i) in float64; the 1e-9 keeps a product such as 0.07 * 100 = 7.000000000000001 at
    7.
    """
    counts = torch.ceil(lengths.double() * ratio - 1e-9).long()
    return torch.minimum(counts.clamp(min=1), lengths)


def cluster_one(x: Tensor, clusters: int, k: int) -> Tensor:
    """Assignment [N] of one sequence's tokens [N, D]."""
    n = x.shape[0]
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    square = _square_distances(x)
    spread = square.topk(min(k, n), largest=False).values.sum(dim=1) / (min(k, n) * x.shape[1])

    index = torch.arange(n, device=x.device)
    # A smaller spread is a higher density: compared before exp, which would round neighbours into ties.
    denser = (spread < spread[:, None]) | ((spread == spread[:, None]) & (index < index[:, None]))
    separation = torch.where(denser, square, torch.inf).amin(dim=1)
    separation = torch.where(denser.any(dim=1), separation, square.max())
    importance = (-spread).exp() * (separation / x.shape[1]).sqrt()
    importance = importance.nan_to_num(nan=0.0, posinf=torch.inf)

    centres = importance.argsort(descending=True, stable=True)[:clusters]
    assignment = square[:, centres].argmin(dim=1)
    assignment[centres] = torch.arange(clusters, device=x.device)
    return assignment


def _square_distances(x: Tensor) -> Tensor:
    """[N, N] float32, symmetric, NaN as infinity.

    The Gram form in float64, rounded once: it holds what the difference of two float32 tokens holds, and
    equal distances are equal numbers whatever the order of summation. What is left of two equal tokens counts
    as 0.
    """
    x = x.double()
    gram = x @ x.T
    norm = gram.diagonal()
    both = norm[:, None] + norm
    square = both - 2 * gram
    square = square.masked_fill(square < _ROUNDING * both, 0)
    return torch.minimum(square, square.T).nan_to_num(nan=torch.inf, posinf=torch.inf).float()


def cluster_merge(
    tokens: Tensor, weight: Tensor, assignment: Tensor, lengths: Tensor, cluster_lengths: Tensor
) -> Tensor:
    """See `atomas_kernels.cluster_merge`."""
    checks.segment_sizes("lengths", lengths, tokens.shape[0])
    total = int(cluster_lengths.sum())
    checks.segment_sizes("cluster_lengths", cluster_lengths, total)
    sequence = segment_index(lengths)
    checks.index_range("assignment", assignment, cluster_lengths[sequence])

    first = cluster_lengths.cumsum(0) - cluster_lengths
    cluster = first[sequence] + assignment
    x, w = compute_dtype(tokens), compute_dtype(weight)
    weight_sum = w.new_zeros(total).index_add(0, cluster, w)
    weighted_sum = x.new_zeros(total, x.shape[1]).index_add(0, cluster, x * w[:, None])
    return (weighted_sum / (weight_sum + _WEIGHT_FLOOR)[:, None]).to(tokens.dtype)
