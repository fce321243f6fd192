"""Processes of a job, forked from one that has imported everything: a start costs milliseconds instead of seconds."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

LAUNCHER_VARIABLES = ("SLURM_", "OMPI_", "PMI", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "TORCHELASTIC_")
_IMPORTED = [
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "deepspeed",
    "transformers",
    "atomas.training.loop",
]
_SLOWEST = 400.0
"""Seconds after which a job hangs"""
_ALONE = 60.0
"""Seconds in which the other ranks follow one that failed"""


def run_ranks(function: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """`function(rank, *arguments)` in a process for each rank; what one raises is raised here."""
    _start_server()
    method = multiprocessing.get_start_method()
    mp.start_processes(_rank, args=(method, function, arguments), nprocs=ranks, start_method="forkserver")


def run_command(arguments: Sequence[str], ranks: int, log: Path) -> "subprocess.CompletedProcess[str]":
    """`atomas ARGUMENTS` in each of some processes, placed by torchrun's variables.

    Args:
        arguments: of the command.
        ranks: how many processes.
        log: where standard error is kept, rank by rank.

    Returns:
        The first exit code that is not 0, and all of standard error, rank 0 last: it is the one that speaks.
    """
    _start_server()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
    if ranks > 1:
        clean |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        clean |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    context, method = mp.get_context("forkserver"), multiprocessing.get_start_method()
    logs = [log.with_name(f"{log.name}_{rank}") for rank in range(ranks)]
    processes = []
    for rank, file in enumerate(logs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(
            context.Process(
                target=_command, args=(method, list(arguments), clean | place, os.getcwd(), str(file))
            )
        )
        processes[-1].start()
    deadline = time.monotonic() + _SLOWEST
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + _ALONE)
        wait([process.sentinel for process in processes if process.exitcode is None], timeout=0.2)
    for process in processes:
        process.kill()  # nothing to the ones that have ended
        process.join()
    codes = [process.exitcode or 0 for process in processes]
    errors = "".join(file.read_text(encoding="utf-8", errors="replace") for file in reversed(logs))
    return subprocess.CompletedProcess(
        list(arguments), next((code for code in codes if code), 0), stdout="", stderr=errors
    )


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _start_server() -> None:
    """All processes run on the CPU, also where there is a GPU: DeepSpeed asks when it is imported."""
    mp.get_context("forkserver").set_forkserver_preload(_IMPORTED)
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["DS_ACCELERATOR"]
        if before is not None:
            os.environ["DS_ACCELERATOR"] = before


def _rank(rank: int, method: str, function: Callable[..., None], arguments: Sequence[Any]) -> None:
    multiprocessing.set_start_method(
        method, force=True
    )  # a rank's own children start as they would without us
    function(rank, *arguments)


def _command(method: str, arguments: list[str], environ: Mapping[str, str], folder: str, log: str) -> None:
    """What a new process does, in which only the imports are done."""
    multiprocessing.set_start_method(method, force=True)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(descriptor, sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)

    from atomas.cli import main

    main(arguments)
