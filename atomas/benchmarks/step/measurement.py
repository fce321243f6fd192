"""One provider in processes of its own: its steps are timed there, and its peak of memory is its own."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from atomas.benchmarks.step.pairs import TokenPair, collate
from atomas.benchmarks.step.presets import Preset
from atomas.benchmarks.step.switches import PUBLISHED, switched_off
from atomas.config import Config
from atomas.data.batching import PairBatch
from atomas.distributed.process_group import process_group
from atomas.phases import observed_by
from atomas.training.telemetry import memory_mb
from atomas.training.timing import StepTimer
from atomas_kernels.bench import memory

_STATUS = Path("/proc/self/status")

Step = Callable[[PairBatch], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one provider is to do."""

    provider: str
    preset: Preset
    config: Config
    batches: Sequence[Sequence[TokenPair]]
    """Of all ranks together, one for each step; the first `warm_up` steps are not timed"""
    warm_up: int
    seconds: float
    """No further step is begun after this time, but for the first timed ones"""
    memory_limit: int
    """Bytes that a process may allocate on the CPU"""
    world_size: int = 1
    rank: int = 0
    port: int = 0


@dataclass(kw_only=True)
class Measurement:
    """What one process found."""

    status: str = "ok"
    """`ok`, `oom` or `failed`"""
    reason: str | None = None
    seconds: list[float] = field(default_factory=list)
    """of each timed step"""
    cpu_seconds: list[float] = field(default_factory=list)
    """Time on cores of each timed step, which another process's load does not lengthen much"""
    phases: list[dict[str, float]] = field(default_factory=list)
    """Seconds of the parts of each timed step"""
    losses: dict[str, float] = field(default_factory=dict)
    """of the first step"""
    peak_mb: float | None = None
    """Resident set of the whole process on the CPU, what torch allocated on CUDA; both in MiB"""
    base_mb: float | None = None
    """The same before there was a model"""

    @property
    def enough(self) -> bool:
        """Whether there are steps to take a median of."""
        return len(self.seconds) >= 2


def measure(job: Job) -> list[Measurement]:
    """Run `job` in a new process for each rank. Whatever happens there, the answer is measurements, one of each."""
    # Nothing is inherited: what is resident there is what such a run needs, its libraries among it.
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    pipes, processes = [], []
    for rank in range(job.world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_serve, args=(replace(job, rank=rank, port=port), sender), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    found: list[Measurement] = []
    for receiver, process in zip(pipes, processes, strict=True):
        try:
            found.append(receiver.recv())
        except EOFError:
            process.join()
            found.append(_died(process.exitcode or 0))
        process.join()
    return found


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _died(code: int) -> Measurement:
    death = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    # SIGKILL is the kernel's answer to too little memory.
    status = "oom" if death == "SIGKILL" else "failed"
    return Measurement(status=status, reason=f"the process ended with {death}")


def _serve(job: Job, sender: Connection) -> None:
    found = Measurement()
    try:
        with _rank(job) as device, memory.limited(job.memory_limit, device):
            _run(job, device, found)
    except Exception as failure:  # a provider may fail in any way; the others are still measured
        lines = str(failure).strip().splitlines() or ["no message"]
        found.status = "oom" if memory.ran_out(failure) else "failed"
        found.reason = f"{type(failure).__name__}: {lines[0]}"
    sender.send(found)


@contextmanager
def _rank(job: Job) -> Iterator[torch.device]:
    """The process group, as a launcher starts it."""
    os.environ.update(
        RANK=str(job.rank),
        WORLD_SIZE=str(job.world_size),
        LOCAL_RANK=str(job.rank),
        LOCAL_WORLD_SIZE=str(job.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(job.port),
    )
    with process_group(job.config.run) as (_, device):
        yield device


def _run(job: Job, device: torch.device, found: Measurement) -> None:
    found.base_mb = _peak_mb(device)
    step = build_step(job, device)
    timer = StepTimer(device)
    begun = time.perf_counter()
    with observed_by(timer):
        for number, pairs in enumerate(job.batches):
            # Steps are collective: ranks that stop by their own clocks would wait for each other.
            if job.world_size == 1 and found.enough and time.perf_counter() - begun > job.seconds:
                break
            batch = collate(pairs, first=number * len(pairs)).split(job.world_size)[job.rank].to(device)
            timer.lap()
            used = time.process_time()
            losses = step(batch)
            phases = timer.lap()
            used = time.process_time() - used
            if number == 0:
                found.losses = {name: float(value) for name, value in losses.items()}
            if number >= job.warm_up:
                found.seconds.append(sum(phases.values()))
                found.cpu_seconds.append(used)
                found.phases.append(phases)
            found.peak_mb = max(found.peak_mb or 0.0, _peak_mb(device))


def _peak_mb(device: torch.device) -> float:
    """Peak memory until now, on CUDA since the last call, in MiB."""
    if device.type != "cuda" and _STATUS.exists():
        # Not ru_maxrss: a process starts with that of the one which started it.
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    return memory_mb(device)["peak_memory_mb"]


def build_step(job: Job, device: torch.device) -> Step:
    """What `job` measures, for one rank inside its process group."""
    if job.provider == PUBLISHED:
        from atomas.benchmarks.step.published_step import PublishedStep

        return PublishedStep(job.config, job.preset, device)
    from atomas.benchmarks.step.ours import OurStep

    return OurStep(job.config, job.preset, device, job.world_size, switched_off(job.provider))
