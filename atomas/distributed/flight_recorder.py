"""What this rank is doing, and what it did in its last steps: phases, collectives, and how long each took."""

import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from atomas.json_files import write_json
from atomas.phases import Collective, Observer

FORMAT = "atomas-flight/1"
COMMUNICATING = ("communication", "encoder", "decoder", "momentum", "backward", "optimizer", "checkpoint")
"""Phases in which a rank can wait for others: our collectives, and those of DeepSpeed, which under ZeRO 3 gathers
weights wherever they are used."""
_RAISED_IN = "raised in "
_ROOM = 16 * 2**10
"""Bytes that are held for a flight file without its steps."""


@dataclass(kw_only=True)
class Call:
    """One collective of a step."""

    name: str
    """Kind and what travels: "all_gather of tokens of level 0" """
    number: int
    """Counts this rank's collectives from 1: the same number is the same collective on every rank."""
    at: float
    """Seconds after the step began"""
    seconds: float | None = None
    """How long it took; None while it has not ended"""


@dataclass(kw_only=True)
class Step:
    """Timings of one optimizer step."""

    step: int
    """Counts from 1; 0 is everything before the first step of this process."""
    started: float
    seconds: float | None = None
    """None while it has not ended"""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, without the phases inside it"""
    collectives: list[Call] = field(default_factory=list)


@dataclass(kw_only=True)
class _Frame:
    name: str
    started: float
    inside: float = 0.0
    call: Call | None = None


class FlightRecorder(Observer):
    """Remembers the last steps in memory; written to a file only when something has failed."""

    def __init__(self, *, rank: int, keep: int = 100) -> None:
        self._rank = rank
        self._steps: deque[Step] = deque([Step(step=0, started=time.monotonic())], maxlen=keep)
        self._stack: list[_Frame] = []
        self.collectives = 0
        """Collectives that have begun"""

    @property
    def step(self) -> int:
        """The step in flight; 0 before the first."""
        return self._steps[-1].step

    def begin_step(self, step: int) -> None:
        """What follows belongs to optimizer step `step`, counted from 1."""
        now = time.monotonic()
        self._steps[-1].seconds = now - self._steps[-1].started
        self._steps.append(Step(step=step, started=now))

    def enter(self, name: str) -> None:
        """See `Observer`."""
        self._stack.append(_Frame(name=name, started=time.monotonic()))

    def leave(self, name: str) -> None:
        """See `Observer`."""
        error = sys.exception()
        if error is not None and raised_in(error) is None:
            error.add_note(_RAISED_IN + self.place())  # the stack is empty when the error reaches its handler
        # not always the last: a thread beside the loop may be writing a checkpoint
        innermost = max(i for i, frame in enumerate(self._stack) if frame.name == name)
        frame = self._stack.pop(innermost)
        seconds = time.monotonic() - frame.started
        phases = self._steps[-1].phases
        phases[name] = phases.get(name, 0.0) + seconds - frame.inside
        if self._stack:
            self._stack[-1].inside += seconds
        if frame.call is not None:
            frame.call.seconds = seconds

    def collective(self, call: Collective) -> None:
        """See `Observer`."""
        self.collectives += 1
        step, frame = self._steps[-1], self._stack[-1]
        frame.call = Call(
            name=f"{call.kind} of {call.what}", number=self.collectives, at=frame.started - step.started
        )
        step.collectives.append(frame.call)

    def place(self) -> str:
        """Where this rank is, for people: "step 12, all_gather of tokens of level 0"."""
        stack = tuple(self._stack)  # other threads ask, while the stack moves on
        where = f"step {self.step}" if self.step else "start-up"
        if not stack:
            return where
        call = stack[-1].call
        return f"{where}, {stack[-1].name if call is None else call.name}"

    def waiting_seconds(self, phases: tuple[str, ...]) -> float | None:
        """How long ago the outermost of the present phases that is among `phases` began; None if none is."""
        frame = next((frame for frame in tuple(self._stack) if frame.name in phases), None)
        return None if frame is None else time.monotonic() - frame.started

    def make_room(self, folder: Path) -> None:
        """Take some space there now, so that a flight file finds it on a disk that is full by then.

        Raises:
            OSError: the folder cannot be written.
        """
        self._room(folder).write_bytes(os.urandom(_ROOM))  # zeros take no space on some disks

    def give_room_back(self, folder: Path) -> None:
        """Counterpart of `make_room`."""
        self._room(folder).unlink(missing_ok=True)

    def _room(self, folder: Path) -> Path:
        return folder / f".flight_rank_{self._rank:04d}.room"

    def dump(
        self, folder: Path, reason: str, *, guilty: Sequence[int] = (), error: BaseException | None = None
    ) -> Path:
        """Write `flight_rank_0000.json`, newest step last; without the steps where there is no room for them.

        Args:
            folder: where.
            reason: why the process ends, in one line.
            guilty: the ranks that it ends for.
            error: what was raised here.

        Raises:
            OSError: the folder cannot be written.
        """
        path = folder / f"flight_rank_{self._rank:04d}.json"
        flight = {
            "format": FORMAT,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "reason": reason,
            "guilty": list(guilty),
            "traceback": "" if error is None else "".join(traceback.format_exception(error)),
            "place": (raised_in(error) if error else None) or self.place(),
            "collectives": self.collectives,
            "steps": [_as_json(step) for step in tuple(self._steps)],
        }
        self.give_room_back(folder)
        try:
            write_json(path, flight)
        except OSError:
            write_json(path, flight | {"steps": []})
        return path


def raised_in(error: BaseException) -> str | None:
    """The place that an error came from, where it has passed through a phase."""
    notes = getattr(error, "__notes__", ())
    return next((note.removeprefix(_RAISED_IN) for note in notes if note.startswith(_RAISED_IN)), None)


def _as_json(step: Step) -> dict[str, Any]:
    return {
        "step": step.step,
        "seconds": _rounded(step.seconds),
        "phases": {name: _rounded(seconds) for name, seconds in dict(step.phases).items()},
        "collectives": [
            {
                "name": call.name,
                "number": call.number,
                "at": _rounded(call.at),
                "seconds": _rounded(call.seconds),
            }
            for call in tuple(step.collectives)
        ],
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
