"""Peak memory of an operation, and a limit that it meets before the machine does."""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
GIB = 2**30


class Peak:
    """`bytes` beyond what was held at the start; None where it cannot be known."""

    bytes: int | None = None


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Measures the largest memory held inside the block, beyond what was held at its start.

    On the CPU this is the resident set (Linux: its high-water mark is reset first; the kernel counts it to some
    hundred KiB), on CUDA what torch allocates.
    """
    found = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    if not _CLEAR.exists():
        yield found
        return
    # What is garbage now would be freed inside the block and hide as much, and what the allocator keeps of earlier runs
    # would be used again without a trace.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")  # resets VmHWM (proc_pid_clear_refs(5))
    before = _status("VmRSS")
    yield found
    found.bytes = max(0, _status("VmHWM") - before)


def available(device: torch.device) -> int:
    """Bytes that can still be allocated, with some room left for others."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if sys.platform == "linux" else []
    values = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    return int(values["MemAvailable"] * 1024 * 0.75) if values else 8 * GIB


@contextmanager
def limited(more: int, device: torch.device) -> Iterator[None]:
    """Inside the block, allocating `more` bytes beyond what is held now fails as an exception on the CPU.

    Without it the kernel hands out more than there is, and ends some process when it is used.
    """
    if device.type == "cuda" or not _STATUS.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status("VmData") + more
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def ran_out(failure: BaseException) -> bool:
    """Whether an exception says that there was not enough memory; C code without room for one says nothing."""
    return isinstance(failure, MemoryError | torch.OutOfMemoryError) or any(
        words in str(failure) for words in ("allocate memory", "error return without exception set")
    )


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = _STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))
