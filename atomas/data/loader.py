"""Ordered items of a dataset from worker processes that leave signals and errors to the parent."""

import signal
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from atomas.errors import AtomasError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

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

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        # A worker begins with this mask: a signal that comes before it ignores them waits, instead of ending it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_PARENT)
        try:
            items = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for item in items:
            if isinstance(item, AtomasError):
                raise item
            yield item


class _Guarded(Dataset[T | AtomasError], Generic[T]):
    def __init__(self, items: Items[T]) -> None:
        self._items = items

    def __getitem__(self, number: int) -> T | AtomasError:
        try:
            return self._items[number]
        except AtomasError as error:
            return error


def _identity(item: T) -> T:
    return item


def _ignore_signals(worker: int) -> None:
    # The scheduler and Ctrl-C signal every process of a job. The trainer answers by saving a checkpoint, for
    # which it may still need its workers; they end when it closes them, or when they find it gone.
    for name in _OF_THE_PARENT:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_PARENT)
