"""Where the seconds of a step go: each moment belongs to the innermost phase it falls into."""

import time
from itertools import pairwise

import torch

from atomas.phases import Observer

STEP_PHASES = (
    "data",
    "encoder",
    "momentum",
    "polymerisation",
    "interaction",
    "contrastive",
    "decoder",
    "lm_loss",
    "backward",
    "communication",
    "optimizer",
)
"""The phases that are told apart, in the order of a step."""

OTHER = "other"
"""What is outside of them, in a phase of another name or in none."""


class StepTimer(Observer):
    """Exclusive seconds of each phase between two laps: they add up to the time between the laps.

    On CUDA the time is that of the device's current stream, taken from events that are read once per lap: nothing waits
    for the device inside a step. A phase in which the device has nothing to do, because the host is late, has the idle
    time; one whose host work is hidden behind queued kernels has none. On other devices it is the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._inside: list[str] = []
        self._marks: list[tuple[float | torch.cuda.Event, str]] = [(self._now(), OTHER)]

    def enter(self, name: str) -> None:
        """From now on time belongs to `name`."""
        self._inside.append(name)
        self._marks.append((self._now(), name))

    def leave(self, name: str) -> None:
        """Time belongs to the phase around it again."""
        self._inside.pop()
        self._marks.append((self._now(), self._inside[-1] if self._inside else OTHER))

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap of every one of STEP_PHASES and OTHER. Waits for the device."""
        assert not self._inside, f"a lap inside the phase {self._inside[-1]!r}"
        end = self._now()
        if isinstance(end, torch.cuda.Event):
            end.synchronize()
        seconds = dict.fromkeys((*STEP_PHASES, OTHER), 0.0)
        for (start, name), (stop, _) in pairwise([*self._marks, (end, OTHER)]):
            seconds[name if name in seconds else OTHER] += _seconds_between(start, stop)
        self._marks = [(end, OTHER)]
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
        return start.elapsed_time(stop) / 1000
    assert isinstance(start, float)
    assert isinstance(stop, float)
    return stop - start
