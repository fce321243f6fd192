"""Freed memory stays with the process."""

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
