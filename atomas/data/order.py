"""The global order: which record stands at which position of the endless training stream.

A pure function of the corpus, the seed and the position. Nothing is stateful, so the state of the data is one
integer, the same for every world size and number of workers.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = "order_v1"

K = TypeVar("K")
V = TypeVar("V")

_BLOCKS, _RECORDS = 0, 1  # independent streams of random numbers
_GOLDEN_RATIO = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class GlobalOrder:
    """Position p of the stream -> (epoch, record): epochs follow each other without a gap or a dropped tail.

    In every epoch the blocks are permuted, and the eligible records of each `window_blocks` consecutive
    blocks of that permutation are permuted together; so a reader holds one window of blocks at a time.
    `block_sizes` are the records per block in stored order; `eligible` ([num_records] bool) leaves records
    out.
    """

    def __init__(
        self,
        block_sizes: Sequence[int] | NDArray[np.integer],
        *,
        seed: int,
        window_blocks: int,
        eligible: NDArray[np.bool_] | None = None,
    ) -> None:
        bounds = np.concatenate([[0], np.cumsum(block_sizes, dtype=np.int64)])
        chosen = np.ones(bounds[-1], dtype=bool) if eligible is None else eligible
        assert chosen.shape == (bounds[-1],), "one flag per record"
        # A bit for each record: 12.5 MB for 100 million, where their numbers would take 800.
        self._eligible = np.packbits(chosen)
        self._starts = bounds
        self._sizes = np.array(
            [np.count_nonzero(chosen[start:stop]) for start, stop in pairwise(bounds)], dtype=np.int64
        )
        self._length = int(self._sizes.sum())
        self._seed = seed
        self.window_blocks = window_blocks
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._windows: dict[tuple[int, int], NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Eligible records: the length of one epoch."""
        return self._length

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Records at positions start, ..., stop - 1: [stop - start] int64. Costs O(window), not O(start)."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, len(self))
            _, ends = self._epoch(epoch)
            number = int(np.searchsorted(ends, offset, side="right"))
            window = self._window(epoch, number)
            begin = offset - (int(ends[number]) - len(window))
            part = window[begin : begin + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted blocks of an epoch, and the position in the epoch where each window ends."""
        if epoch not in self._epochs:
            blocks = _permutation(np.arange(len(self._sizes)), self._seed, epoch, _BLOCKS)
            sizes = self._sizes[blocks]
            starts = np.arange(0, len(blocks), self.window_blocks)
            _keep_two(self._epochs, epoch, (blocks, np.cumsum(np.add.reduceat(sizes, starts))))
        return self._epochs[epoch]

    def _window(self, epoch: int, number: int) -> NDArray[np.int64]:
        """The permuted records of a window."""
        key = (epoch, number)
        if key not in self._windows:
            blocks, _ = self._epoch(epoch)
            chosen = blocks[number * self.window_blocks : (number + 1) * self.window_blocks]
            records = np.concatenate([self._records_of(block) for block in chosen.tolist()])
            _keep_two(self._windows, key, _permutation(records, self._seed, epoch, _RECORDS))
        return self._windows[key]

    def _records_of(self, block: int) -> NDArray[np.int64]:
        """The eligible records of a block."""
        start, stop = (int(bound) for bound in self._starts[block : block + 2])
        bits = np.unpackbits(self._eligible[start // 8 : -(-stop // 8)])[start % 8 :][: stop - start]
        return start + np.flatnonzero(bits)


def _permutation(items: NDArray[np.int64], seed: int, epoch: int, stream: int) -> NDArray[np.int64]:
    """`items` in the order of a hash of each.

    Sorted by the outputs of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators") at index `item`, seeded by the other arguments: numpy's own shuffles may change between its
    versions.
    """
    key = 0
    for value in (seed, epoch, stream):
        key = int(_mix(np.array([(key ^ value) + _GOLDEN_RATIO & _MASK], dtype=np.uint64))[0])
    hashes = _mix(np.uint64(key) + items.astype(np.uint64) * np.uint64(_GOLDEN_RATIO))
    return items[np.argsort(hashes, kind="stable")]


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _keep_two(cache: dict[K, V], key: K, value: V) -> None:
    """A batch may straddle two windows or epochs; more than two are never needed again."""
    if len(cache) == 2:
        del cache[next(iter(cache))]
    cache[key] = value
