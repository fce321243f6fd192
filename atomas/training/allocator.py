"""Memory on the CPU: how the C library hands it out, and how many kernels are kept in it."""

import ctypes
import os

keeps_freed_memory = True
"""Whether `keep_freed_memory` does anything: the benchmark's ablation switches it off."""

KERNELS_KEPT = 128

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


def bound_kernel_caches() -> None:
    """Let oneDNN, and torch's layer above it, keep the kernels of about a step each; the environment may say more.

    In bf16 on the CPU both compile and keep a kernel for every shape, up to 1024 of a quarter MiB; with ragged batches
    hardly any shape comes again after its step. They ask once, at the first product.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KERNELS_KEPT))
