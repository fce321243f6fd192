"""Freed memory stays with the process, and few compiled products do."""

import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import resource, torch
from atomas.training import allocator
allocator.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(20):
        torch.ones(4 << 20)  # 16 MiB, freed at once
work()
before = faults()
work()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_the_same_pages_are_used_again() -> None:
    found = subprocess.run([sys.executable, "-c", _PROGRAM], check=True, capture_output=True, text=True)
    assert int(found.stdout) < 1000  # 20 times 4,096 pages where they are returned to the kernel


_PRODUCTS = """
import torch
from atomas.training import allocator
from atomas.training.memory_gauge import _allocated_by_glibc
allocator.bound_kernel_caches()
weight = torch.randn(64, 64, dtype=torch.bfloat16)
held = _allocated_by_glibc()
def work(first):
    for tokens in range(first, first + 3 * allocator.KERNELS_KEPT):
        torch.nn.functional.linear(torch.randn(tokens, 64, dtype=torch.bfloat16), weight)
    return held()
print(work(5000) - work(200))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallinfo2 is of glibc")
def test_products_of_many_shapes_do_not_pile_up() -> None:
    found = subprocess.run([sys.executable, "-c", _PRODUCTS], check=True, capture_output=True, text=True)
    assert int(found.stdout) < 32 << 20  # 200 MiB where each of 384 is kept twice
