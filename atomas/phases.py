"""Named phases of a step, and what each rank sends in them: told to whoever observes.

The model and the loop say where they are (`with phase("encoder")`), the collectives say what they send; step timer,
byte counter and watchdog listen. Without an observer a phase costs a loop over an empty list.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

CollectiveKind = Literal["all_gather", "all_reduce", "reduce_scatter", "broadcast", "exchange"]


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective call of ours, as this rank sees it."""

    kind: CollectiveKind
    """`exchange` sends to one neighbour and receives from another"""
    what: str
    """What travels, for people: "tokens of level 0" """
    payload_bytes: int
    """Size of what this rank puts in: its own part of an all-gather, the whole tensor of an all-reduce or a
    reduce-scatter, the message of an exchange."""


class Observer:
    """Base of those who listen; each overrides what it needs."""

    def enter(self, name: str) -> None:
        """The phase `name` begins; phases nest."""

    def leave(self, name: str) -> None:
        """The innermost phase, `name`, has ended, or an exception leaves it."""

    def collective(self, call: Collective) -> None:
        """A collective begins; it ends with the phase "communication" around it."""


_observers: list[Observer] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The block is the phase `name` of whatever phase is around it."""
    observers = tuple(_observers)
    for observer in observers:
        observer.enter(name)
    try:
        yield
    finally:
        for observer in reversed(observers):
            observer.leave(name)


@contextmanager
def communication(call: Collective) -> Iterator[None]:
    """The block is one collective."""
    with phase("communication"):
        for observer in _observers:
            observer.collective(call)
        yield


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """Tell `observer` of all phases and collectives of the block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
