"""Backends under test and random ragged batches."""

import os
from collections.abc import Callable, Iterator
from typing import Any

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


@pytest.fixture(autouse=True)
def _no_bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies the bits of bfloat16 numbers: a test that let it would prove nothing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in (*args, *kwargs.values())):
            raise TypeError("the interpreter computes bfloat16 wrongly: use float32 or float16")
        launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", checked)
