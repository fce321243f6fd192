"""Map over processes with the results in the order of the input."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import Any, TypeVar

from atomas.errors import AtomasError

T = TypeVar("T")


def ordered_map(
    function: Callable[..., T], arguments: Iterable[tuple[Any, ...]], *, workers: int
) -> Iterator[T]:
    """Yield `function(*one)` for each of `arguments`, in order, computed by `workers` processes.

    Reads `arguments` only a little ahead of what is consumed. One worker means this process.
    """
    if workers == 1:
        yield from (function(*one) for one in arguments)
        return
    # Forked, because a spawned worker would run the caller's script again. No thread is alive here.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_ignore_interrupts)
    pending: deque[Future[T]] = deque()
    try:
        for one in arguments:
            pending.append(pool.submit(function, *one))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise AtomasError("a worker process died (out of memory?): run again with fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunked(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items (the last may be shorter)."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole process group; only the parent is to react.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
