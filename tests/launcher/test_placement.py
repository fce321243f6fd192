"""Every launcher's variables lead to the same answer."""

import pytest

from atomas_launcher.placement import Placement, PlacementError, find_placement

# as seen in a step of two tasks on two nodes, and under mpirun on one host
STEP = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


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
        # deepspeed's own launcher
        ("torchrun", {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}),
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
                "SLURM_NODEID": "1",
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
    assert find_placement({**STEP, "SLURM_STEP_NODELIST": nodes}).address == first


@pytest.mark.parametrize(
    ("tasks", "sizes"),
    [("2,1", [2, 1]), ("2(x2),1", [2, 2, 1]), ("1(x3)", [1, 1, 1]), ("4", [4]), ("12(x2)", [12, 12])],
)
def test_slurm_nodes_may_differ(tasks: str, sizes: list[int]) -> None:
    for node, size in enumerate(sizes):
        environ = {**STEP, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_STEP_NUM_TASKS": str(sum(sizes))}
        placement = find_placement({**environ, "SLURM_NODEID": str(node), "SLURM_LOCALID": str(size - 1)})
        assert (placement.local_world_size, placement.world_size) == (size, sum(sizes))


def test_ports_follow_from_the_job() -> None:
    """All ranks of a step take one port; other jobs and other steps of the job take others."""
    environs = [STEP, {**STEP, "SLURM_STEP_ID": "1"}, {**STEP, "SLURM_JOB_ID": "42"}]
    mpi = [{**MPI, "PMIX_NAMESPACE": name} for name in ("885850113", "prterun-host-12@1")]
    ports = [find_placement(environ).port for environ in environs + mpi]
    assert len(set(ports)) == 5
    assert all(20000 <= port < 32000 for port in ports)
    other_rank = {**STEP, "SLURM_PROCID": "1", "SLURM_NODEID": "1"}
    assert find_placement(other_rank).port == ports[0]


def test_one_host_needs_no_address() -> None:
    assert find_placement(MPI).address == "127.0.0.1"
    several = {**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(PlacementError, match=r"MASTER_ADDR is not set.*mpirun -x MASTER_ADDR=HOST"):
        find_placement(several)
    one_node = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "no-such-host"}
    assert find_placement(one_node).address == "127.0.0.1"


def test_mpirun_inside_an_allocation() -> None:
    """Slurm's step is then that of mpirun's daemons: one task a node, perhaps not on the node of rank 0."""
    ranks = {
        **MPI,
        "OMPI_COMM_WORLD_SIZE": "3",
        "OMPI_COMM_WORLD_RANK": "2",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    }
    daemons = {**STEP, "SLURM_STEP_NODELIST": "n2", "SLURM_JOB_NODELIST": "n[1-2]"}
    placement = find_placement({**daemons, **ranks})
    assert (placement.launcher, placement.rank, placement.world_size) == ("openmpi", 2, 3)
    assert placement.address == "n1"


def test_torchrun_inside_a_step_or_under_mpirun() -> None:
    torchrun = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "7",
    }  # fmt: skip
    for outer in (STEP, MPI):  # two tasks, one a node, each of them a torchrun of two processes
        placement = find_placement({**outer, **torchrun})
        assert (placement.launcher, placement.rank, placement.local_world_size) == ("torchrun", 3, 2)
        assert (placement.address, placement.port) == ("n1", 29400)


def test_pmi_of_slurm_is_not_mpich() -> None:
    """`srun --mpi=pmi2` sets PMI_RANK and PMI_SIZE, but no local rank."""
    placement = find_placement({**STEP, "PMI_RANK": "0", "PMI_SIZE": "2"})
    assert (placement.launcher, placement.world_size, placement.address) == ("slurm", 2, "n1")


def test_shell_inside_an_allocation_is_one_process() -> None:
    """SLURM_PROCID is set in the batch script too; only a step of several tasks is a distributed job."""
    assert find_placement({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).launcher == "single"
    one = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    assert find_placement(one).world_size == 1


def test_disagreement_names_both_variables() -> None:
    torch_names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    with pytest.raises(PlacementError, match=r"WORLD_SIZE=2 but OMPI_COMM_WORLD_SIZE=4"):
        find_placement({**MPI, **torch_names, "OMPI_COMM_WORLD_SIZE": "4"})
    with pytest.raises(PlacementError, match=r"RANK=0 but OMPI_COMM_WORLD_RANK=1"):
        find_placement({**MPI, **torch_names, "OMPI_COMM_WORLD_RANK": "1"})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 is not within WORLD_SIZE=2"),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK='one' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        (
            {**MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "2"},
            "OMPI_COMM_WORLD_LOCAL_RANK=2, 2 processes on this host",
        ),
        ({**STEP, "SLURM_NODEID": "2"}, r"SLURM_NODEID=2, but SLURM_STEP_TASKS_PER_NODE=1\(x2\) has 2 nodes"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1x2"}, "SLURM_STEP_TASKS_PER_NODE='1x2' is not a list"),
    ],
)
def test_broken_environments(environ: dict[str, str], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        find_placement(environ)
