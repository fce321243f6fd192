"""Each rank's share of the cores of its host."""

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from atomas.distributed.process_group import fair_threads, share_of_cores
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    ("cores", "threads"),
    [
        ([range(8), range(8)], [4, 4]),  # torchrun: nobody is bound
        ([range(4), range(4, 8)], [4, 4]),  # srun --cpus-per-task=4, or mpirun bound to sockets
        ([range(1), range(1, 2)], [1, 1]),  # mpirun bound to cores
        ([range(6), range(6), range(6)], [2, 2, 2]),
        ([range(2), range(2), range(2)], [1, 1, 1]),  # more ranks than cores
        ([range(6), range(4, 8)], [5, 3]),  # two cores shared
    ],
)
def test_shared_cores_are_divided(cores: list[range], threads: list[int]) -> None:
    lists = [list(each) for each in cores]
    assert [share_of_cores(each, lists) for each in lists] == threads


def _worker(rank: int, path: str, cores: list[int]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    half = len(cores) // 2
    os.sched_setaffinity(0, cores)
    assert fair_threads() == max(1, len(cores) // 2)
    dist.barrier()
    os.sched_setaffinity(0, cores[:half] if rank == 0 else cores[half:])
    assert fair_threads() == (half if rank == 0 else len(cores) - half)
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to cores here")
def test_bound_and_unbound_ranks(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    run_ranks(_worker, 2, str(tmp_path / "store"), cores)
