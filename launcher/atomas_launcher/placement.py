"""Rank, world size and rendezvous of this process, whichever launcher started it.

One table, one rule: the first launcher whose variables are complete decides; where a second complete one
contradicts it, that is an error that names both. Standard library only, so that a login node can use it.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


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
    local_world_size: str


_LAUNCHERS = (
    # torchrun, deepspeed and Kubernetes operators all speak torch's names
    _Variables(
        launcher="torchrun",
        rank="RANK",
        world_size="WORLD_SIZE",
        local_rank="LOCAL_RANK",
        local_world_size="LOCAL_WORLD_SIZE",
    ),
    _Variables(
        launcher="openmpi",
        rank="OMPI_COMM_WORLD_RANK",
        world_size="OMPI_COMM_WORLD_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
        local_world_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    # Intel MPI and MPICH
    _Variables(
        launcher="mpich",
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank="MPI_LOCALRANKID",
        local_world_size="MPI_LOCALNRANKS",
    ),
    # last: SLURM_* are set in every shell inside an allocation, also under torchrun or mpirun
    _Variables(
        launcher="slurm",
        rank="SLURM_PROCID",
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank="SLURM_LOCALID",
        local_world_size="SLURM_STEP_TASKS_PER_NODE",
    ),
)


def find_placement(environ: Mapping[str, str] | None = None) -> Placement:
    """Read the environment of torchrun, deepspeed, srun, mpirun, or of a plain `python` (one process).

    Raises:
        PlacementError: variables of one launcher are inconsistent, or two launchers disagree on the world size.
    """
    environ = os.environ if environ is None else environ
    found = [v for v in _LAUNCHERS if v.rank in environ and v.world_size in environ]
    if found and found[0].launcher == "slurm" and environ.get("SLURM_STEP_NUM_TASKS") == "1":
        found = []  # a step of one task is a plain process that happens to run inside an allocation
    if not found:
        return Placement(
            rank=0, world_size=1, local_rank=0, local_world_size=1, address="127.0.0.1",
            port=_port(environ), launcher="single",
        )  # fmt: skip
    chosen = found[0]
    rank, world_size = _integer(environ, chosen.rank), _integer(environ, chosen.world_size)
    for other in found[1:]:
        if other.launcher != "slurm" and _integer(environ, other.world_size) != world_size:
            raise PlacementError(
                f"{chosen.world_size}={world_size} but {other.world_size}={environ[other.world_size]}: two launchers "
                "disagree; unset the variables of the one that did not start this job"
            )
    if not 0 <= rank < world_size:
        raise PlacementError(f"{chosen.rank}={rank} is not within {chosen.world_size}={world_size}")
    local_rank = _integer(environ, chosen.local_rank, default=rank if world_size == 1 else None)
    local_world_size = _integer(environ, chosen.local_world_size, default=local_rank + 1)
    return Placement(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        address=_address(environ, world_size),
        port=_port(environ),
        launcher=chosen.launcher,
    )


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None:
        if default is None:
            raise PlacementError(f"{name} is not set, although the job has several processes")
        return default
    match = re.match(r"\d+", text)  # Slurm writes "4(x2)" for two nodes of four tasks
    if match is None:
        raise PlacementError(f"{name}={text!r} is not a number")
    return int(match.group())


def _address(environ: Mapping[str, str], world_size: int) -> str:
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if nodes:
        return _first_host(nodes)
    if world_size == 1:
        return "127.0.0.1"
    raise PlacementError("MASTER_ADDR is not set: give the host of rank 0")


def _first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[007-009,12],x1` -> `gpu007`."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodes)
    if match is None:
        raise PlacementError(f"cannot read the node list {nodes!r}: set MASTER_ADDR")
    return f"{match.group(1)}{match.group(2) or ''}{match.group(3)}"


def _port(environ: Mapping[str, str]) -> int:
    """MASTER_PORT, or one that follows from the job id, so that two jobs on a host do not meet."""
    if "MASTER_PORT" in environ:
        return _integer(environ, "MASTER_PORT")
    return 20000 + int(environ.get("SLURM_JOB_ID", "9500")) % 20000
