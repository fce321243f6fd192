"""Small decisions that all ranks must take together."""

import contextlib
import itertools
import logging
import pickle
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from atomas.distributed.collectives import all_reduce, rank, world_size
from atomas.errors import AtomasError
from atomas.phases import Collective, communication, phase

logger = logging.getLogger("atomas")


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
def together(what: str) -> Iterator[None]:
    """Run a block on all ranks; where it fails on one, it fails on all, instead of leaving the rest in a collective.

    The block may take one rank hours and the others nothing: who is through waits at the store, which has no time
    limit, and not in a collective, which has. Whether the rank that works is still alive is the watchdog's to say.
    The block must not contain collectives after a point where a single rank can fail.

    Raises:
        AtomasError: the block has failed with an OSError or an AtomasError here, or in any way on another rank.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    elsewhere = _meet(what, None if failure is None else _in_one_line(failure))
    if failure is None:
        if elsewhere:
            raise AtomasError(f"{what} failed on {elsewhere}")
    elif isinstance(failure, OSError):
        raise AtomasError(f"{what} failed on rank {rank()}: {failure}") from failure
    else:
        raise failure


_meetings = itertools.count()
"""Each has keys of its own in the store"""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 1.0
"""Seconds between two looks at the store; growing"""
_TOLD_EVERY = 60.0
"""Seconds after which a rank that waits says so again"""


def _meet(what: str, failure: str | None) -> str:
    """Wait, however long it takes, until all ranks are here; what one of those says that have failed, "" if none."""
    if world_size() == 1:
        return ""
    number = next(_meetings)
    group = dist.group.WORLD
    assert group is not None
    store = dist.PrefixStore("atomas/together", group.get_group_store())
    here, failed, complete = (f"{number}/{name}" for name in ("here", "failed", "complete"))
    if failure is not None:
        store.set(failed, f"rank {rank()}: {failure}")
    if store.add(here, 1) == world_size():
        told = store.get(failed).decode() if store.check([failed]) else ""
        for name in ("here", "failed", "complete"):  # all have left the meeting before this one
            store.delete_key(f"{number - 1}/{name}")
        store.set(complete, told)
        return told
    begun = last_told = time.monotonic()
    pause = _FIRST_PAUSE
    with phase(f"waiting for the others: {what}"):
        while not store.check([complete]):
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            now = time.monotonic()
            if now - last_told > _TOLD_EVERY:
                last_told, missing = now, world_size() - store.add(here, 0)
                waited = f"{(now - begun) / 60:.0f} min for {missing} of {world_size()} ranks"
                logger.info("%s: has waited %s", what, waited)
    return store.get(complete).decode()


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if isinstance(error, AtomasError) else f"{type(error).__name__}: {text}")[:500]
