"""Ranks that come to a decision at very different times: real processes on gloo."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from atomas.config import RunConfig
from atomas.distributed import agreement
from atomas.distributed.agreement import any_rank, together
from atomas.distributed.watchdog import watch
from atomas.errors import AtomasError
from atomas_launcher.placement import Placement
from tests.ranks import run_ranks

LIMIT = 4.0
"""Seconds that a collective may take"""


def _meet(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=LIMIT),
    )


def _works_longer_than_a_collective_may_take(rank: int, folder: str) -> None:
    _meet(rank, folder)
    placement = Placement(
        rank=rank, world_size=2, local_rank=rank, local_world_size=2, address="127.0.0.1", port=0,
        launcher="torchrun",
    )  # fmt: skip
    limits = RunConfig(collective_timeout_seconds=LIMIT, silence_timeout_seconds=LIMIT)
    with watch(limits, placement):
        for working in (0, 1, 0):  # the store is in rank 0's process
            begun = time.monotonic()
            with together("measuring"):
                if rank == working:
                    time.sleep(2 * LIMIT)
            assert time.monotonic() - begun >= 2 * LIMIT - 1
            assert any_rank(rank == working, torch.device("cpu"))
    dist.barrier()
    # the limit is one: a rank that waits so long in a collective fails
    if rank == 0:
        time.sleep(3 * LIMIT)
    else:
        with pytest.raises(RuntimeError):
            any_rank(False, torch.device("cpu"))


def test_work_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    run_ranks(_works_longer_than_a_collective_may_take, 2, str(tmp_path))


def _read_or_raise(error: Exception | None) -> None:
    with together("reading"):
        if error is not None:
            raise error


def _fails_on_one(rank: int, folder: str) -> None:
    _meet(rank, folder)
    store = dist.group.WORLD.get_group_store()
    full = "[Errno 28] No space left on device"
    with pytest.raises(AtomasError) as told:
        _read_or_raise(OSError(28, "No space left on device") if rank == 0 else None)
    assert str(told.value) == f"reading failed on rank 0: {full if rank == 0 else 'OSError: ' + full}"
    with pytest.raises(AtomasError) as told:
        _read_or_raise(AtomasError("shard 7 is broken") if rank == 1 else None)
    assert str(told.value) == ("shard 7 is broken" if rank else "reading failed on rank 1: shard 7 is broken")
    with pytest.raises(ValueError if rank else AtomasError, match=r"no\snumber"):
        _read_or_raise(ValueError("no\nnumber") if rank == 1 else None)
    _read_or_raise(None)  # what failed before does not stay
    dist.barrier()
    if rank == 0:  # nor do the keys of meetings that are over
        last = next(agreement._meetings) - 1
        assert store.check([f"atomas/together/{last}/complete"])
        assert not any(
            store.check([f"atomas/together/{n}/{k}"]) for n in range(last) for k in ("here", "failed")
        )
    dist.barrier()


def test_what_fails_on_one_rank_fails_on_all_with_its_reason(tmp_path: Path) -> None:
    run_ranks(_fails_on_one, 2, str(tmp_path))


def test_alone_a_block_just_runs() -> None:
    with pytest.raises(KeyError):
        _read_or_raise(KeyError("x"))
