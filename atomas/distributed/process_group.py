"""Start and end the process group: NCCL on CUDA, gloo on CPU, one path for both."""

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from fractions import Fraction

import torch
import torch.distributed as dist

from atomas.config import RunConfig
from atomas.distributed.rank_zero_store import meeting_store
from atomas.errors import AtomasError
from atomas_launcher.placement import Placement, PlacementError, find_placement

_WATCHDOG_FIRST = 60.0
"""Seconds by which gloo and NCCL give up later than the watchdog, whose message says who is missing."""


def resolve_device(wanted: str, local_rank: int) -> torch.device:
    """`auto`, `cpu` or `cuda` -> the device of this rank.

    Raises:
        AtomasError: CUDA is asked for and absent, or there are fewer devices than ranks on this host.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise AtomasError("run.device = 'cuda', but torch sees no CUDA device; use --run.device cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise AtomasError(
            f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}; start fewer processes"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def process_group(run: RunConfig) -> Iterator[tuple[Placement, torch.device]]:
    """Set threads, seeds' device and the process group of this rank, and take it down again.

    DeepSpeed wants a group even for one process, so there always is one.
    """
    try:
        placement = find_placement()
    except PlacementError as error:
        raise AtomasError(str(error)) from None
    device = resolve_device(run.device, placement.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DeepSpeed reads these from the environment, whichever launcher gave them.
    os.environ.update(
        RANK=str(placement.rank),
        WORLD_SIZE=str(placement.world_size),
        LOCAL_RANK=str(placement.local_rank),
        LOCAL_SIZE=str(placement.local_world_size),
        MASTER_ADDR=placement.address,
        MASTER_PORT=str(placement.port),
        DS_ACCELERATOR=device.type,
    )
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=meeting_store(placement),
            rank=placement.rank,
            world_size=placement.world_size,
            timeout=timedelta(seconds=run.collective_timeout_seconds + _WATCHDOG_FIRST),
        )
    except (OSError, RuntimeError, dist.DistError) as error:
        raise AtomasError(
            f"rank {placement.rank} cannot meet the others at {placement.address}:{placement.port}: {error}"
        ) from None
    try:
        torch.set_num_threads(run.threads or fair_threads())
        yield placement, device
    finally:
        dist.destroy_process_group()


def fair_threads() -> int:
    """This rank's share of the CPU cores that it may use. Collective."""
    here = socket.gethostname()
    mine = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    everywhere: list[tuple[str, list[int]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(everywhere, (here, mine))
    return share_of_cores(mine, [cores for host, cores in everywhere if host == here])


def share_of_cores(mine: list[int], of_all: list[list[int]]) -> int:
    """Threads for a process that may use the cores `mine`, among processes of one host (this one included).

    mpirun and srun bind each rank to cores of its own, torchrun gives all of them to all: so each core is divided
    by the processes that share it, and the parts are added up, exactly.
    """
    sharers = Counter(core for cores in of_all for core in cores)
    return max(1, int(sum(Fraction(1, sharers[core]) for core in mine)))
