"""The rows of every rank come past every rank: gathered all at once, or one rank's after the other in a ring.

A ring holds the rows of two ranks instead of all W. While a block is worked on, the next one is on its way; in the
backward pass the gradient of a block rides behind it and is complete when it is home.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from atomas.distributed.collectives import (
    all_gather_rows,
    rank,
    reduce_scatter_rows,
    send_to_next,
    world_size,
)

ExchangeMode = Literal["allgather", "ring"]
Owners = Sequence[int]
"""Ranks whose rows are in a block, in the order of the rows."""


def visit_blocks(
    rows: Tensor,
    sizes: Sequence[int],
    mode: ExchangeMode,
    visitor: Callable[[Tensor, Owners], None],
    *,
    what: str,
) -> None:
    """Call `visitor(block, owners)` with the rows of all ranks, each rank's once.

    Args:
        rows: [sizes[rank], ...], this rank's rows; no gradient is recorded.
        sizes: rows of each rank.
        mode: `allgather` makes one call with all rows, `ring` makes W calls, this rank's own rows first.
        visitor: must not keep `block`.
        what: name of what travels, for people.
    """
    ranks = world_size()
    if mode == "allgather" or ranks == 1:
        visitor(all_gather_rows(rows, sizes, what), range(ranks))
        return
    block = rows.detach()
    for step in range(ranks):
        owner, following = (rank() - step) % ranks, (rank() - step - 1) % ranks
        if step < ranks - 1:
            arrival = send_to_next(block, (sizes[following], *rows.shape[1:]), what)
        visitor(block, [owner])
        if step < ranks - 1:
            block = arrival()


def visit_blocks_with_gradient(
    rows: Tensor,
    sizes: Sequence[int],
    mode: ExchangeMode,
    visitor: Callable[[Tensor, Owners], Tensor],
    *,
    what: str,
) -> Tensor:
    """As `visit_blocks`; `visitor` returns this rank's gradient of the block, of any width and dtype.

    Returns:
        The gradient of `rows`: the sum of what all ranks' visitors returned for them.
    """
    ranks = world_size()
    gradient_name = f"gradient of {what}"
    if mode == "allgather" or ranks == 1:
        gradient = visitor(all_gather_rows(rows, sizes, what), range(ranks))
        return reduce_scatter_rows(gradient, sizes, gradient_name)
    block = rows.detach()
    ride: Callable[[], Tensor] | None = None
    for step in range(ranks):
        owner, following = (rank() - step) % ranks, (rank() - step - 1) % ranks
        if step < ranks - 1:
            arrival = send_to_next(block, (sizes[following], *rows.shape[1:]), what)
        gradient = visitor(block, [owner])
        if ride is not None:  # what the ranks before have added to this block's gradient
            gradient = gradient + ride()
        ride = send_to_next(gradient, (sizes[following], *gradient.shape[1:]), gradient_name)
        if step < ranks - 1:
            block = arrival()
    assert ride is not None
    return ride()
