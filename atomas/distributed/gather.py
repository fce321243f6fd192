"""All-gather that carries exact gradients.

Every rank computes its share of one global loss L from gathered tensors, and data parallelism *averages* parameter
gradients over ranks. The gradient that reaches a rank's own rows must then be the sum over ranks of what each of them
sent back, which is W times dL/d(rows); the average takes the W away. Gathers whose backward only slices (the
published code) give 1 / W of the encoder's gradient instead. torch's own differentiable gathers are deprecated as of
2.13.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atomas.distributed.collectives import (
    all_gather_rows,
    all_gather_sizes,
    reduce_scatter_rows,
    world_size,
)


def gather_rows(rows: Tensor, sizes: Sequence[int] | None = None, *, what: str) -> Tensor:
    """Concatenate the rows of all ranks, in rank order, with gradient.

    Args:
        rows: [n, ...], any dtype; n and only n may differ between ranks. Dtypes without gradient are gathered too.
        sizes: rows of each rank, if already known; asked of all ranks otherwise.
        what: name of what is gathered, for people.

    Returns:
        [n_0 + ... + n_{W-1}, ...]; `rows` itself when there is one rank. Backward: every rank receives the sum over
        ranks of the gradient of its own rows.
    """
    if world_size() == 1:
        return rows
    if sizes is None:
        sizes = all_gather_sizes(rows.shape[0], rows.device, f"number of {what}")
    if rows.is_floating_point():
        return _GatherRows.apply(rows, tuple(sizes), what)
    return all_gather_rows(rows, sizes, what)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...], what: str) -> Tensor:
        ctx.sizes, ctx.what = sizes, what
        return all_gather_rows(rows, sizes, what)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_rows(grads[0], ctx.sizes, f"gradient of {ctx.what}"), None, None
