"""Tests that need a GPU. `kernels/bench/gpu.sh` runs them.

With ATOMAS_GPU_TEST_DEVICE=cpu the backends of the CPU go through the same tests, which tests the tests.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

import atomas_kernels
from atomas_kernels import registry
from tests.gpu.problems import DEVICE


@pytest.fixture(autouse=True, scope="session")
def _device() -> None:
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU (ATOMAS_GPU_TEST_DEVICE=cpu runs these tests on the CPU)")


@pytest.fixture
def backend() -> Iterator[Callable[[str], None]]:
    """`set_backend`, undone after the test."""
    before = registry._chosen
    yield atomas_kernels.set_backend
    atomas_kernels.set_backend(before)
