"""Backends under test and random ragged batches."""

from collections.abc import Callable, Iterator

import pytest
import torch

import atomas_kernels
from atomas_kernels import registry


@pytest.fixture
def backend() -> Iterator[Callable[[str], None]]:
    """`set_backend`, undone after the test."""
    before = registry._chosen
    yield atomas_kernels.set_backend
    atomas_kernels.set_backend(before)


@pytest.fixture(params=["reference", "native"])
def each_backend(request: pytest.FixtureRequest, backend: Callable[[str], None]) -> str:
    """Runs the test once per CPU backend."""
    if request.param == "native":
        pytest.importorskip("atomas_kernels._native", reason="the native module is not built")
    backend(request.param)
    return str(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
