"""What became of a run to which something happened, and the list of everything that is made to happen."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.ground import Ground


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One fault, from the moment it struck to the end of the run that went on after it."""

    happened: str
    """What the run, its launcher or `atomas doctor RUN` said."""
    start: str
    """How the run was started."""
    again: str
    """What started it again: itself, the scheduler, or a person with the same command."""
    steps_lost: int
    """Steps that were done twice."""
    detect_seconds: float
    """From the fault until the job had ended everywhere, or had said what is wrong."""
    resume_seconds: float
    """From the fault, or from the start by hand where there was one, until the next step was done."""
    deviation: float
    """Largest relative difference of a loss from that of the undisturbed run, over all steps."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A row of the table."""

    name: str
    play: "Callable[[Ground], Outcome]"
    is_quick: bool
    """Among the tests that run on every commit."""
    lost: int
    """No more steps than these may be lost: those since the newest whole checkpoint. A checkpoint that is still being
    written when a rank is killed is lost with it, so two intervals."""


FAULTS: list[Fault] = []


def fault(
    name: str, *, lost: int = 4, is_quick: bool = False
) -> "Callable[[Callable[[Ground], Outcome]], Callable[[Ground], Outcome]]":
    """Enter a function in the list."""

    def enter(play: "Callable[[Ground], Outcome]") -> "Callable[[Ground], Outcome]":
        FAULTS.append(Fault(name=name, play=play, is_quick=is_quick, lost=lost))
        return play

    return enter


class CannotPlayError(Exception):
    """This host lacks what a fault needs; the message says what."""
