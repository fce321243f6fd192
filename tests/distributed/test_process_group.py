"""Each rank's share of the cores of its host."""

import pytest

from atomas.distributed.process_group import share_of_cores


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
