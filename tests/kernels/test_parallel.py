"""Native kernels share the threads of torch's loops, but for the child of a fork, where there are none."""

import subprocess
import sys

import pytest

pytest.importorskip("atomas_kernels._native")

_PROGRAM = """
import os, sys, threading, torch
from atomas_kernels import packed_attention
torch.set_num_threads(2)
lengths = torch.full((8,), 64)
query, key, value = torch.randn(3, 512, 4, 16)
def run():
    return packed_attention(query, key, value, lengths, lengths)
def threads():
    return len(os.listdir("/proc/self/task"))
torch.ones(1 << 22).exp_()  # torch's threads are there from here on
before, first = threads(), run()
for _ in range(20):
    assert torch.equal(run(), first)
assert threads() == before, (threads(), before)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(run(), first) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_are_shared_and_not_expected_in_a_forked_child() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", _PROGRAM], check=True, timeout=120)
