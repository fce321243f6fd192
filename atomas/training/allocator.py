"""How the C library hands out memory on the CPU."""

import ctypes

keeps_freed_memory = True
"""Whether `keep_freed_memory` does anything: the benchmark's ablation switches it off."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_LARGEST_INT = 2**31 - 1
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)


def keep_freed_memory() -> None:
    """Let the process keep the memory of freed tensors for the next ones, as torch does on CUDA.

    glibc maps tensors of more than some MiB one by one and returns them to the kernel when they are freed: every step
    then takes tens of thousands of page faults to get the same memory again. Nothing happens with another C library.
    """
    if keeps_freed_memory and _mallopt is not None:
        _mallopt(_MMAP_THRESHOLD, 2**30)
        _mallopt(_TRIM_THRESHOLD, _LARGEST_INT)
