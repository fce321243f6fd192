"""Density-peak clustering with one program per sequence and its whole distance matrix in registers.

Ranks are counted instead of sorted, so there is no sort, no top-k and no atomic: the result is the same on
every run. Sequences of more than 128 tokens, whose matrix does not fit, go through the reference one by one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomas_kernels import checks
from atomas_kernels.reference import clustering as reference

LONGEST = 128
BLOCK_D = 16


def launch_options(size: int) -> dict[str, int]:
    """Warps and stages for matrices of `size` x `size`: at most 64 entries of each matrix per thread."""
    return {"num_warps": {16: 1, 32: 2, 64: 4, 128: 8}[size], "num_stages": 2}


def dpc_knn(tokens: Tensor, lengths: Tensor, *, ratio: float, k: int) -> tuple[Tensor, Tensor]:
    """See `atomas_kernels.dpc_knn`. Distances by the Gram form: tf32 in three parts, close to float32."""
    sizes = checks.segment_sizes("lengths", lengths, tokens.shape[0])
    counts = reference.cluster_counts(lengths, ratio)
    assignment = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
    fitting = [size for size in sizes if 0 < size <= LONGEST]
    if fitting:
        size = max(16, triton.next_power_of_2(max(fitting)))
        flat = tokens.float().contiguous()
        arguments = (flat, lengths, lengths.cumsum(0), counts, assignment, flat.shape[1], k)
        cluster_kernel[(len(sizes),)](*arguments, SIZE=size, BLOCK_D=BLOCK_D, **launch_options(size))
    for label, part, size, count in zip(
        assignment.split(sizes), tokens.split(sizes), sizes, counts.tolist(), strict=True
    ):
        if size > LONGEST:
            label.copy_(reference.cluster_one(part, count, k))
    return assignment, counts


@triton.jit
def cluster_kernel(  # type: ignore[no-untyped-def]
    tokens,
    lengths,
    ends,
    counts,
    assignment,
    width,
    k,
    SIZE: tl.constexpr,  # noqa: N803
    BLOCK_D: tl.constexpr,  # noqa: N803
):
    """Labels of one sequence of at most SIZE tokens; others are left alone."""
    sequence = tl.program_id(0)
    n = tl.load(lengths + sequence).to(tl.int32)
    if n > 0 and n <= SIZE:
        begin = tl.load(ends + sequence) - n
        clusters = tl.load(counts + sequence).to(tl.int32)
        row = tl.arange(0, SIZE)
        i, j = row[:, None], row[None, :]

        gram = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        for d in range(0, width, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            inside = (i < n) & (column[None, :] < width)
            x = tl.load(tokens + (begin + i) * width + column[None, :], mask=inside, other=0.0)
            gram = tl.dot(x, tl.trans(x), gram, input_precision="tf32x3")
        # The norms come from the same product, so that equal tokens are at distance 0 exactly.
        norm = tl.sum(tl.where(i == j, gram, 0.0), axis=1)
        square = norm[:, None] + norm[None, :] - 2 * gram
        # NaN is infinity; comparing in this order keeps it from becoming 0.
        square = tl.where(square > 0, square, tl.where(square == square, 0.0, float("inf")))
        square = tl.where((i < n) & (j < n), square, float("inf"))

        # The k nearest in order of (distance, index): what was taken is told from the last one alone, so that
        # no second matrix has to be kept.
        neighbours = tl.minimum(k, n)
        spread = tl.zeros((SIZE,), dtype=tl.float32)
        last = tl.full((SIZE,), -1.0, dtype=tl.float32)
        where = tl.zeros((SIZE,), dtype=tl.int32)
        for _ in range(neighbours):
            left = (square > last[:, None]) | ((square == last[:, None]) & (j > where[:, None]))
            last, where = tl.min(tl.where(left, square, float("inf")), axis=1, return_indices=True)
            spread += last
        spread = spread / (neighbours * width).to(tl.float32)

        own, other = spread[:, None], spread[None, :]
        # Places behind the end have infinite spread and, below, importance -1: they come before no token.
        denser = (other < own) | ((other == own) & (j < i))
        separation = tl.min(tl.where(denser, square, float("inf")), axis=1)
        largest = tl.max(tl.max(tl.where((i < n) & (j < n), square, 0.0), axis=1), axis=0)
        densest = tl.max(denser.to(tl.int32), axis=1) == 0
        separation = tl.where(densest, largest, separation)
        importance = tl.exp(-spread) * tl.sqrt(separation / width)
        importance = tl.where(row < n, tl.where(importance == importance, importance, 0.0), -1.0)

        own, other = importance[:, None], importance[None, :]
        before = (other > own) | ((other == own) & (j < i))
        rank = tl.sum(before.to(tl.int32), axis=1)
        rank = tl.where(row < n, rank, SIZE)
        is_centre = (rank < clusters)[None, :]
        to_centre = tl.where(is_centre, square, float("inf"))
        nearest = tl.min(to_centre, axis=1)
        candidates = tl.where(is_centre & (to_centre == nearest[:, None]), rank[None, :], SIZE)
        label = tl.where(rank < clusters, rank, tl.min(candidates, axis=1))
        tl.store(assignment + begin + row, label.to(tl.int64), mask=row < n)
