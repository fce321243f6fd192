"""Every launcher's variables lead to the same answer."""

import pytest

from atomas_launcher.placement import Placement, PlacementError, find_placement


def test_plain_python_is_one_process() -> None:
    assert find_placement({}) == Placement(
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        address="127.0.0.1",
        port=29500,
        launcher="single",
    )


@pytest.mark.parametrize(
    ("launcher", "environ"),
    [
        ("torchrun", {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}),
        (
            "openmpi",
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
        ),
        ("mpich", {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}),
        (
            "slurm",
            {
                "SLURM_PROCID": "3",
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
            },
        ),
    ],
)
def test_each_launcher(launcher: str, environ: dict[str, str]) -> None:
    placement = find_placement({**environ, "MASTER_ADDR": "node0", "MASTER_PORT": "1234"})
    assert placement == Placement(
        rank=3, world_size=4, local_rank=1, local_world_size=2, address="node0", port=1234, launcher=launcher
    )


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[007-009,12],x1", "gpu007"), ("n1,n2", "n1"), ("single", "single"), ("a[1-2]-ib", "a1-ib")],
)
def test_slurm_rendezvous_is_the_first_node(nodes: str, first: str) -> None:
    environ = {
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_JOB_ID": "41",
    }
    placement = find_placement(environ)
    assert (placement.address, placement.port) == (first, 20041)


def test_shell_inside_an_allocation_is_one_process() -> None:
    """SLURM_PROCID is set in the batch script too; only a step of several tasks is a distributed job."""
    assert find_placement({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).launcher == "single"
    one = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    assert find_placement(one).world_size == 1


def test_disagreement_names_both_variables() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(PlacementError, match=r"WORLD_SIZE=2 but OMPI_COMM_WORLD_SIZE=4"):
        find_placement(environ)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 is not within WORLD_SIZE=2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
    ],
)
def test_broken_environments(environ: dict[str, str], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        find_placement(environ)
