"""Ordered items of a dataset from worker processes that leave signals and errors to the parent."""

import atexit
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from atomas.errors import AtomasError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_workers: "WeakSet[BaseProcess]" = WeakSet()
_OF_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Items(Protocol[T_co]):
    """A pure function of a number."""

    def __getitem__(self, number: int) -> T_co: ...


class OrderedLoader(DataLoader[T]):
    """`items[n]` for each n of `numbers`, in that order whatever `num_workers` is (0: this process).

    Raises AtomasError as the worker raised it, not wrapped into a worker's traceback.
    """

    def __init__(
        self, items: Items[T], numbers: Sequence[int], *, num_workers: int, pin_memory: bool = False
    ) -> None:
        super().__init__(
            _Guarded(items),  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_signals,
            # Its own, or starting to iterate would draw from the generator that dropout continues.
            generator=torch.Generator(),
        )

    def __iter__(self) -> "OrderedItems[T]":  # type: ignore[override]
        # A worker begins with this mask: a signal that comes before it ignores them waits, instead of ending it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_PARENT)
        try:
            made = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _workers.update(getattr(made, "_workers", ()))
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # the last one registered is the first to run, before torch's
        return OrderedItems(made)


class OrderedItems(Iterator[T]):
    """The items of one pass."""

    def __init__(self, made: Iterator["_Made"]) -> None:
        self._made = made
        self.cpu_seconds = 0.0
        """Processor time that the items given so far have cost, in whichever process"""

    def __next__(self) -> T:
        item, seconds = next(self._made)
        self.cpu_seconds += seconds
        if isinstance(item, _Failure):
            self._made = iter(())  # a traceback that somebody keeps is not to keep the workers
            raise item.error
        return item


class _Made(NamedTuple):
    """An item, or why there is none, and what it cost; a tuple, so that torch pins the memory of what is in it."""

    item: Any
    cpu_seconds: float


class _Failure(NamedTuple):
    error: AtomasError


class _Guarded(Dataset[_Made], Generic[T]):
    def __init__(self, items: Items[T]) -> None:
        self._items = items

    def __getitem__(self, number: int) -> _Made:
        started = time.process_time()
        try:
            item: T | _Failure = self._items[number]
        except AtomasError as error:
            item = _Failure(error)
        return _Made(item, time.process_time() - started)


def _end_workers() -> None:
    # A process that ends with an error may still hold its workers. multiprocessing would ask them to end with
    # SIGTERM, which they ignore, and wait for them for ever.
    workers = [worker for worker in _workers if worker.is_alive()]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their end as an error
    for worker in workers:
        worker.kill()


def _identity(item: T) -> T:
    return item


def _ignore_signals(worker: int) -> None:
    # The scheduler and Ctrl-C signal every process of a job. The trainer answers by saving a checkpoint, for
    # which it may still need its workers; they end when it closes them, or when they find it gone.
    for name in _OF_THE_PARENT:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_PARENT)
