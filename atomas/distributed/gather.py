"""All-gather that carries exact gradients.

Every rank computes the same global loss L from gathered tensors, and data parallelism *averages* parameter gradients
over ranks. The gradient that reaches a rank's own rows must then be the sum over ranks of what each of them sent
back, which is W times dL/d(rows); the average takes the W away. Gathers whose backward only slices (the published
code) give 1 / W of the encoder's gradient instead. torch's own differentiable gathers are deprecated as of 2.13.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, with gradient.

    Args:
        rows: [n, ...], any dtype; n and only n may differ between ranks. Dtypes without gradient are gathered too.
        sizes: rows of each rank, if already known (see `gather_sizes`); asked of all ranks otherwise.

    Returns:
        [n_0 + ... + n_{W-1}, ...]; `rows` itself when there is one rank. Backward: every rank receives the sum over
        ranks of the gradient of its own rows.
    """
    if world_size() == 1:
        return rows
    if sizes is None:
        sizes = gather_sizes(rows.shape[0], rows.device)
    if rows.is_floating_point():
        return _GatherRows.apply(rows, tuple(sizes))
    return _all_gather(rows, sizes)


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """One integer of every rank, in rank order."""
    if world_size() == 1:
        return [size]
    sizes = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([size], dtype=torch.int64, device=device))
    return [int(item) for item in sizes]


def world_size() -> int:
    """Number of ranks; 1 where no process group runs."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 where no process group runs."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        return _all_gather(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # A reduce-scatter: each rank keeps the sum of what all ranks hold for its rows. gloo has no ragged
        # reduce-scatter, and the padded all-reduce moves the same bytes per link as its ring would twice.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.split(ctx.sizes)[rank()].contiguous(), None


def _all_gather(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Ragged all-gather: rows are padded to the longest rank, because gloo wants equal shapes."""
    longest = max(sizes)
    padded = rows.detach().contiguous()
    if rows.shape[0] < longest:
        padded = torch.cat([padded, padded.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
