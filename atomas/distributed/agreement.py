"""Small decisions that all ranks must take together."""

import contextlib
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from atomas.distributed.collectives import all_reduce, rank, world_size
from atomas.errors import AtomasError
from atomas.phases import Collective, communication


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank where it is True on one."""
    if world_size() == 1:
        return flag
    vote = torch.tensor([int(flag)], device=device)
    return bool(all_reduce(vote, "vote", dist.ReduceOp.MAX).item())


def each_of_any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """`any_rank` of several flags at once."""
    if world_size() == 1:
        return list(flags)
    votes = torch.tensor([int(flag) for flag in flags], device=device)
    return [bool(vote) for vote in all_reduce(votes, "votes", dist.ReduceOp.MAX).tolist()]


def from_rank_zero(value: Any) -> Any:
    """What rank 0 holds, on every rank. Only for small values that can be pickled."""
    if world_size() == 1:
        return value
    box = [value]
    sent = len(pickle.dumps(value)) if rank() == 0 else 0
    with communication(Collective(kind="broadcast", what="a decision of rank 0", payload_bytes=sent)):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: Any) -> list[Any]:
    """What every rank holds, in the order of ranks. Only for small values that can be pickled."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    sent = len(pickle.dumps(value))
    with communication(Collective(kind="all_gather", what="notes of all ranks", payload_bytes=sent)):
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together(what: str, device: torch.device) -> Iterator[None]:
    """Run a block on all ranks; where it fails on one, it fails on all, instead of leaving the rest in a collective.

    The block must not contain collectives after a point where a single rank can fail.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if any_rank(failure is not None, device):
        if failure is None:
            raise AtomasError(f"{what} failed on another rank; its log says why")
        if isinstance(failure, AtomasError):
            raise failure
        if isinstance(failure, OSError):
            raise AtomasError(f"{what} failed on rank {rank()}: {failure}") from failure
        raise failure
