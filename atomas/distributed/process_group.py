"""Start and end the process group: NCCL on CUDA, gloo on CPU, one path for both."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from atomas.config import RunConfig
from atomas.errors import AtomasError
from atomas_launcher.placement import Placement, PlacementError, find_placement

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


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
    torch.set_num_threads(run.threads or max(1, visible_cores() // placement.local_world_size))
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
            # one process needs no port, and so cannot collide with another run on this host
            store=dist.HashStore() if placement.launcher == "single" else None,
            rank=placement.rank,
            world_size=placement.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    except (RuntimeError, dist.DistError) as error:
        raise AtomasError(
            f"rank {placement.rank} cannot meet the others at {placement.address}:{placement.port}: {error}"
        ) from None
    try:
        yield placement, device
    finally:
        dist.destroy_process_group()


def visible_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
