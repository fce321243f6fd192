"""The most memory that a process has held since a moment."""

import resource
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryGauge:
    """Memory beyond what was held when the gauge was made: made before the model, it measures the training.

    On CUDA that is what torch has allocated. On the CPU it is the resident set: libraries that are loaded late and
    what the allocator keeps are in it, tensors that were never written are not.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self._before = torch.cuda.memory_allocated(device)
            return
        self._before = _resident("VmRSS")
        try:
            _CLEAR.write_text("5")  # VmHWM begins anew (proc_pid_clear_refs(5))
        except OSError:
            self._before = _resident("VmHWM")  # only what goes beyond the old peak can be seen

    def peak(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _resident("VmHWM") - self._before)


def _resident(key: str) -> int:
    """Bytes of the resident set, now (VmRSS) or at its peak (VmHWM); elsewhere than on Linux always the peak."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = (line.partition(":") for line in _STATUS.read_text().splitlines())
    return next(int(rest.split()[0]) * 1024 for name, _, rest in lines if name == key)
