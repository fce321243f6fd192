"""A profile of chosen steps, for chrome://tracing or Perfetto: operators, kernels and the phases around them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from atomas.phases import Observer, observed_by
from atomas.training.telemetry import logger


class TracedSteps:
    """Profiles the steps of `steps` together, and writes them to `path` (Chrome trace JSON) after the last one."""

    def __init__(self, steps: range, path: Path, device: torch.device) -> None:
        self._steps = steps
        self._path = path
        self._on_device = device.type == "cuda"
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The block is step `number`, counted from 1."""
        if number not in self._steps:
            yield
            return
        if self._profile is None:
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_device else [])]
            )
            self._profile.start()
        with record_function(f"step {number}"), observed_by(_Ranges()):
            yield
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write what was profiled, if something was."""
        if self._profile is None:
            return
        self._profile.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
        logger.info("trace of steps %d to %d in %s", self._steps[0], self._steps[-1], self._path)


class _Ranges(Observer):
    """Every phase as a range of the profile."""

    def __init__(self) -> None:
        self._open: list[record_function] = []

    def enter(self, name: str) -> None:
        self._open.append(record_function(name))
        self._open[-1].__enter__()

    def leave(self, name: str) -> None:
        self._open.pop().__exit__(None, None, None)
