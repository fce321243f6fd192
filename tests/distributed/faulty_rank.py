"""`atomas train` with a rank that is killed, stopped, signalled, fails or hangs at a certain moment.

python -m tests.distributed.faulty_rank FAULT RANK MOMENT train ...

MOMENT is the number of a batch, counted from 1, as it is loaded; or lengths (tokenizer and token lengths are about to
be made), choose (checkpoints are about to be hashed; rank 0 alone), first-step, evaluation, save (this rank's part is
half written) or publish (all parts are there, the manifest is not; rank 0 alone), each when it comes for the first
time. FAULT is a signal, sleep, raise, or how many seconds longer the moment takes. The time of the strike is kept in
the file that ATOMAS_STRUCK names.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atomas.cli import main
from atomas.data.batching import PairBatch
from atomas.data.loader import OrderedItems
from atomas.distributed.collectives import rank as own_rank
from atomas.distributed.watchdog import Watchdog
from atomas.training import checkpoint, loop, saver, session, snapshot

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
PLACES: dict[str, tuple[Any, str]] = {
    "lengths": (session, "_open_stream"),
    "choose": (checkpoint, "_choose"),
    "first-step": (loop, "contrastive_step"),
    "evaluation": (loop, "evaluate_retrieval"),
    "save": (snapshot, "write_tensors"),
    "publish": (saver, "publish"),
}
"""Function of a module at whose first call the moment is there."""


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
    if "ATOMAS_STRUCK" in os.environ:
        Path(os.environ["ATOMAS_STRUCK"]).write_text(str(time.time()), encoding="utf-8")
    if fault in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault])
    elif fault == "sleep":
        time.sleep(3600)
    elif fault.isdecimal():
        time.sleep(int(fault))
    else:
        raise ValueError("shard 7 is\nbroken")


def main_with_fault(fault: str, rank: str, moment: str, *arguments: str) -> None:
    """Run `atomas ARGUMENTS` with the fault in it."""
    if moment.isdecimal():
        _strike_while_loading(fault, int(rank), int(moment))
    else:
        _strike_at_first_call(fault, int(rank), *PLACES[moment])
    main(arguments)


def _strike_while_loading(fault: str, rank: int, batch: int) -> None:
    """After a heartbeat from within the step: steps take milliseconds here, and heartbeats come once a second."""
    watchdog = watchdog_of_this_process()
    take = OrderedItems.__next__
    taken = 0

    def take_or_strike(items: OrderedItems[Any]) -> Any:
        nonlocal taken
        item = take(items)
        taken += isinstance(item, PairBatch)  # rank 0 also measures token lengths with a loader
        if taken == batch and own_rank() == rank:
            taken += 1  # once
            wait_until_heard(watchdog())
            strike(fault)
        return item

    OrderedItems.__next__ = take_or_strike  # type: ignore[method-assign]


def _strike_at_first_call(fault: str, rank: int, module: Any, name: str) -> None:
    called: Callable[..., Any] = getattr(module, name)
    struck = []

    def struck_once(*args: Any, **options: Any) -> Any:
        if not struck and own_rank() == rank:
            struck.append(True)
            strike(fault)
        return called(*args, **options)

    setattr(module, name, struck_once)


if __name__ == "__main__":
    main_with_fault(*sys.argv[1:])
