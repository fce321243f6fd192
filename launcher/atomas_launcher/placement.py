"""Rank, world size and rendezvous of this process, whichever launcher started it.

One table, one rule: the first launcher whose variables are complete decides; where a second complete one
contradicts it, that is an error that names both. Standard library only, so that a login node can use it.

Sources: the manual pages torchrun(1), srun(1) "OUTPUT ENVIRONMENT VARIABLES", mpirun(1); all of it was seen in
real environments of torch 2.13, deepspeed 0.19, Slurm 22.05 and Open MPI 4.1 (tests/launcher/test_launchers.py).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from atomas_launcher.job import port_of


class PlacementError(ValueError):
    """The environment does not say consistently where this process stands."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where one process stands in its job."""

    rank: int
    """0 ... world_size - 1 over all hosts."""
    world_size: int
    """Processes of the job."""
    local_rank: int
    """0 ... local_world_size - 1 on this host; picks the device."""
    local_world_size: int
    """Processes on this host."""
    address: str
    """Host of rank 0."""
    port: int
    """Port that rank 0 listens on."""
    launcher: str
    """What decided: torchrun, slurm, openmpi, mpich or single."""


@dataclass(frozen=True, kw_only=True)
class _Variables:
    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: tuple[str, ...]
    """The first of them that is set counts."""
    job: tuple[str, ...] = ()
    """Together the same in all processes of the job, and other than in any other job."""


_LAUNCHERS = (
    # torchrun, deepspeed (whose local size is LOCAL_SIZE) and Kubernetes operators all speak torch's names
    _Variables(
        launcher="torchrun",
        rank="RANK",
        world_size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_world_size=("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    ),
    _Variables(
        launcher="openmpi",
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_world_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
        job=("PMIX_NAMESPACE",),
    ),
    # Intel MPI and MPICH; without the local rank these are the PMI_* that `srun --mpi=pmi2` sets as well
    _Variables(
        launcher="mpich",
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_world_size=("MPI_LOCALNRANKS",),
    ),
    # last: mpirun starts its daemons with srun, and torchrun is often started by it, so theirs are nested in a step
    _Variables(
        launcher="slurm",
        rank="SLURM_PROCID",
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_world_size=("SLURM_STEP_TASKS_PER_NODE",),
        job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
)


def launcher_variables() -> tuple[str, ...]:
    """Every variable by which some launcher tells a process where it stands."""
    names = {"MASTER_ADDR": None, "MASTER_PORT": None}
    for known in _LAUNCHERS:
        listed = (known.rank, known.world_size, known.local_rank, *known.local_world_size, *known.job)
        names |= dict.fromkeys(listed)
    return (*names, "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "TORCHELASTIC_RUN_ID")


def find_placement(environ: Mapping[str, str] | None = None) -> Placement:
    """Read the environment of torchrun, deepspeed, srun, mpirun, or of a plain `python` (one process).

    Raises:
        PlacementError: variables of one launcher are inconsistent, or two launchers disagree.
    """
    environ = os.environ if environ is None else environ
    found = _complete(environ)
    if not found:
        return Placement(
            rank=0, world_size=1, local_rank=0, local_world_size=1, address="127.0.0.1",
            port=_port(environ, ()), launcher="single",
        )  # fmt: skip
    chosen = found[0]
    rank, world_size = _integer(environ, chosen.rank), _integer(environ, chosen.world_size)
    _check_agreement(environ, found)
    if not 0 <= rank < world_size:
        raise PlacementError(f"{chosen.rank}={rank} is not within {chosen.world_size}={world_size}")
    local_rank = 0 if world_size == 1 else _integer(environ, chosen.local_rank)
    local_world_size = _local_world_size(environ, chosen)
    if local_world_size is not None and not local_rank < local_world_size <= world_size:
        raise PlacementError(
            f"{chosen.local_rank}={local_rank}, {local_world_size} processes on this host and "
            f"{chosen.world_size}={world_size} contradict one another"
        )
    return Placement(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size or local_rank + 1,
        address=_address(environ, chosen, is_one_host=local_world_size == world_size),
        port=_port(environ, chosen.job),
        launcher=chosen.launcher,
    )


def _complete(environ: Mapping[str, str]) -> list[_Variables]:
    """The launchers whose variables are all here, the deciding one first."""
    started = [v for v in _LAUNCHERS if v.rank in environ and v.world_size in environ]
    found = [v for v in started if v.local_rank in environ or environ[v.world_size] == "1"]
    if started and not found:
        raise PlacementError(f"{started[0].local_rank} is not set, although the job has several processes")
    if found and found[0].launcher == "slurm" and environ["SLURM_STEP_NUM_TASKS"] == "1":
        return []  # a step of one task is a plain process that happens to run inside an allocation
    return found


def _check_agreement(environ: Mapping[str, str], found: list[_Variables]) -> None:
    if "TORCHELASTIC_RUN_ID" in environ:  # torchrun itself started this process, whatever started torchrun
        return
    chosen = found[0]
    for other in found[1:]:
        if (
            other.launcher == "slurm"
        ):  # the step of the daemons that mpirun or deepspeed starts its processes from
            continue
        for ours, theirs in ((chosen.world_size, other.world_size), (chosen.rank, other.rank)):
            if _integer(environ, ours) != _integer(environ, theirs):
                raise PlacementError(
                    f"{ours}={environ[ours]} but {theirs}={environ[theirs]}: two launchers "
                    "disagree; unset the variables of the one that did not start this job"
                )


def _local_world_size(environ: Mapping[str, str], chosen: _Variables) -> int | None:
    """Processes on this host, or None where the launcher does not say it."""
    name = next((name for name in chosen.local_world_size if name in environ), None)
    if name is None:
        return None
    if chosen.launcher != "slurm":
        return _integer(environ, name)
    tasks = _tasks_per_node(environ[name])
    node = _integer(environ, "SLURM_NODEID")
    if node >= len(tasks):
        raise PlacementError(f"SLURM_NODEID={node}, but {name}={environ[name]} has {len(tasks)} nodes")
    return tasks[node]


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's run lengths: `2(x3),1` -> [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise PlacementError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not a list such as 2(x3),1")
        tasks += [int(match.group(1))] * int(match.group(2) or 1)
    return tasks


def _integer(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise PlacementError(f"{name} is not set, although the job has several processes")
    if not environ[name].isdecimal():
        raise PlacementError(f"{name}={environ[name]!r} is not a number")
    return int(environ[name])


def _address(environ: Mapping[str, str], chosen: _Variables, *, is_one_host: bool) -> str:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    if is_one_host:
        return "127.0.0.1"
    # the step is ours only under srun; under mpirun it is that of its daemons, which need not include rank 0's host
    nodes = environ.get("SLURM_STEP_NODELIST") if chosen.launcher == "slurm" else None
    nodes = nodes or environ.get("SLURM_JOB_NODELIST")
    if nodes:
        return _first_host(nodes)
    how = "mpirun -x MASTER_ADDR=HOST" if chosen.launcher == "openmpi" else "MASTER_ADDR=HOST"
    raise PlacementError(f"MASTER_ADDR is not set: give the host of rank 0 ({how})")


def _first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[007-009,12],x1` -> `gpu007`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodes)
    if match is None:
        raise PlacementError(f"cannot read the node list {nodes!r}: set MASTER_ADDR")
    return f"{match.group(1)}{match.group(2) or ''}{match.group(3)}"


def _port(environ: Mapping[str, str], job: tuple[str, ...]) -> int:
    """MASTER_PORT, or one that follows from the job."""
    if "MASTER_PORT" in environ:
        return _integer(environ, "MASTER_PORT")
    name = ".".join(environ[part] for part in job if part in environ)
    return port_of(name) if name else 29500
