"""The most memory that a process has held."""

import ctypes
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import torch

_EVERY_SECONDS = 0.005
_STATUS = Path("/proc/self/status")


class MemoryGauge:
    """The most that a run's tensors take, from now on.

    On CUDA that is what torch has allocated. On the CPU it is what the C library hands out beyond what it has handed
    out now, to torch and to everyone else, looked up by a thread every few milliseconds until `close`, on top of what
    tensors hold now; without glibc, the same of the resident set. What libraries and Python hold is left out so.
    """

    def __init__(self, device: torch.device, held: int) -> None:
        """`held` bytes are those of the tensors that there are."""
        self._device = device
        self._closed = threading.Event()
        if device.type == "cuda":
            return
        self._now = _allocated_by_glibc() or _resident
        self._rest = self._now() - held
        self._peak = held
        threading.Thread(target=self._watch, name="memory gauge", daemon=True).start()

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._peak

    def close(self) -> None:
        """Look no more: the peak stays what it was."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_EVERY_SECONDS):
            self._peak = max(self._peak, self._now() - self._rest)


class _MallInfo2(ctypes.Structure):
    """mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    ]  # fmt: skip


def _allocated_by_glibc() -> Callable[[], int] | None:
    """What tells the bytes that are handed out, in arenas and as mappings of their own; None without glibc."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _MallInfo2

    def allocated() -> int:
        info = mallinfo2()
        return int(info.uordblks + info.hblkhd)

    return allocated


def _resident() -> int:
    """Bytes of the resident set; elsewhere than on Linux of its peak."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = (line.partition(":") for line in _STATUS.read_text().splitlines())
    return next(int(rest.split()[0]) * 1024 for name, _, rest in lines if name == "VmRSS")
