"""The key-value store in rank 0's process by which the ranks of a job find one another."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from atomas_launcher.placement import Placement

LOOPBACK = "127.0.0.1"


def is_one_host(placement: Placement) -> bool:
    """Whether all processes of the job are on this host."""
    return placement.local_world_size == placement.world_size


def listen(placement: Placement, port: int, patience: timedelta) -> dist.TCPStore:
    """Rank 0's store. On one host it listens on loopback alone; torch's own listens on every interface.

    Args:
        placement: of rank 0.
        port: to listen on; 0 takes a free one.
        patience: how long a key is waited for.

    Raises:
        OSError: the port is taken.
    """
    if not is_one_host(placement):
        return dist.TCPStore(
            placement.address, port, is_master=True, wait_for_workers=False, timeout=patience
        )
    listener = socket.create_server((LOOPBACK, port), backlog=max(128, placement.world_size))
    chosen = listener.getsockname()[1]
    return dist.TCPStore(
        LOOPBACK,
        chosen,
        is_master=True,
        wait_for_workers=False,
        timeout=patience,
        master_listen_fd=listener.detach(),
    )


def connect(placement: Placement, port: int, patience: timedelta) -> dist.TCPStore:
    """The store of another rank, which is rank 0's."""
    address = LOOPBACK if is_one_host(placement) else placement.address
    return dist.TCPStore(address, port, wait_for_workers=False, timeout=patience)


def meeting_store(placement: Placement) -> dist.Store | None:
    """Where the process group meets; None leaves it to torch: on several hosts, and where torchrun's agent has one."""
    if placement.world_size == 1:
        return dist.HashStore()  # needs no port, and so cannot collide with another run on this host
    if not is_one_host(placement) or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    opened = listen if placement.rank == 0 else connect
    return opened(placement, placement.port, dist.default_pg_timeout)
