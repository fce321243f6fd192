"""`atomas train` with a rank that dies, fails or hangs while it loads a certain batch.

python -m tests.distributed.faulty_rank FAULT RANK BATCH train ...
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from atomas.cli import main
from atomas.distributed.watchdog import Watchdog
from atomas.training.session import Session


def watchdog_of_this_process() -> Callable[[], Watchdog]:
    """Keep hold of the watchdog that the command will make."""
    made: list[Watchdog] = []
    start = Watchdog.__init__

    def keep(watchdog: Watchdog, *arguments: Any) -> None:
        start(watchdog, *arguments)
        made.append(watchdog)

    Watchdog.__init__ = keep  # type: ignore[method-assign]
    return lambda: made[-1]


def wait_until_heard(watchdog: Watchdog) -> None:
    """Until the others can know where this rank is; the first message to end may have been written before."""
    beat = watchdog._beat
    while watchdog._beat < beat + 2:
        time.sleep(0.05)


def strike(fault: str) -> None:
    """What happens to the rank."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "sleep":
        time.sleep(3600)
    else:
        raise ValueError("shard 7 is\nbroken")


def main_with_fault(fault: str, rank: str, batch: str, *arguments: str) -> None:
    """Run `atomas ARGUMENTS`; this rank's batch number BATCH, counted from 1, brings the fault.

    It comes after a heartbeat from within the step: steps take milliseconds here, and heartbeats come once a second.
    """
    watchdog = watchdog_of_this_process()
    load = Session.batches

    def batches(session: Session) -> Iterator[Any]:
        loaded: Iterable[Any] = load(session)
        for number, each in enumerate(loaded, 1):
            if number == int(batch) and session.placement.rank == int(rank):
                wait_until_heard(watchdog())
                strike(fault)
            yield each

    Session.batches = batches  # type: ignore[method-assign]
    main(arguments)


if __name__ == "__main__":
    main_with_fault(*sys.argv[1:])
