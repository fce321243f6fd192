"""The global order: which record stands at which position of the endless training stream.

A pure function of the corpus, the seed and the position. Nothing is stateful, so the state of the data is one
integer, the same for every world size and number of workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = "order_v2"

K = TypeVar("K")
V = TypeVar("V")

_BLOCKS, _RECORDS, _SHARDS, _CORPORA, _STAND_INS = range(5)  # independent streams of random numbers
_STAND_INS_NEARBY = 8
_CYCLE = 4096
_GOLDEN_RATIO = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Upcoming:
    """The shards of one corpus that are read next."""

    group: int
    """Number of the group in use since the beginning; `shards` are the same as long as it is"""
    shards: list[int]
    """Those of this group, then those of the one after it"""


class Order(Protocol):
    """Which record stands at which position."""

    def __len__(self) -> int:
        """Positions of one epoch."""
        ...

    @property
    def window_blocks(self) -> int:
        """Blocks that are in use together."""
        ...

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Records at positions start, ..., stop - 1."""
        ...

    def upcoming(self, position: int) -> list[Upcoming]:
        """Of each corpus, the shards that are read from a position on."""
        ...

    def stand_in(self, position: int, attempt: int) -> int:
        """The record that is read at a position after `attempt` others could not be."""
        ...


class GlobalOrder:
    """Position p of the stream -> (epoch, record): epochs follow each other without a gap or a dropped tail.

    In every epoch the shards are permuted, then the blocks of each `group_shards` consecutive shards of that
    permutation together, then the eligible records of each `window_blocks` consecutive blocks. So a reader holds one
    window of blocks at a time, and asks for the shards of a group once in an epoch.
    `block_sizes` are the records per block in stored order, `shard_sizes` the blocks per shard (None: all are in
    one); `eligible` ([num_records] bool) leaves records out.
    """

    def __init__(
        self,
        block_sizes: Sequence[int] | NDArray[np.integer],
        *,
        seed: int,
        window_blocks: int,
        eligible: NDArray[np.bool_] | None = None,
        shard_sizes: Sequence[int] | None = None,
        group_shards: int = 64,
    ) -> None:
        shards = [len(block_sizes)] if shard_sizes is None else shard_sizes
        assert sum(shards) == len(block_sizes), "every block is in a shard"
        self._shard_of_block = np.repeat(np.arange(len(shards)), shards)
        self._group_shards = group_shards
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

    def upcoming(self, position: int) -> list[Upcoming]:
        """The shards that are read from a position on."""
        epoch, offset = divmod(position, len(self))
        blocks, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        shards = self._permuted_shards(epoch)
        place = int(np.flatnonzero(shards == self._shard_of_block[blocks[window * self.window_blocks]])[0])
        number, groups = place // self._group_shards, -(-len(shards) // self._group_shards)
        own = shards[number * self._group_shards : (number + 1) * self._group_shards]
        after = shards[(number + 1) * self._group_shards : (number + 2) * self._group_shards]
        if number + 1 == groups:
            after = self._permuted_shards(epoch + 1)[: self._group_shards]
        ahead = [shard for shard in after.tolist() if shard not in own]
        return [Upcoming(group=epoch * groups + number, shards=own.tolist() + ahead)]

    def _permuted_shards(self, epoch: int) -> NDArray[np.int64]:
        return _permutation(np.arange(self._shard_of_block[-1] + 1), self._seed, epoch, _SHARDS)

    def stand_in(self, position: int, attempt: int) -> int:
        """A record in place of one that cannot be read: of its window in the first attempts, of any beyond."""
        epoch, offset = divmod(position, len(self))
        number = int(_hashes(np.array([attempt]), self._seed, position, _STAND_INS)[0] >> np.uint64(1))
        if attempt >= _STAND_INS_NEARBY:
            start = epoch * len(self) + number % len(self)
            return int(self.indices(start, start + 1)[0])
        _, ends = self._epoch(epoch)
        window = self._window(epoch, int(np.searchsorted(ends, offset, side="right")))
        return int(window[number % len(window)])

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The permuted blocks of an epoch, and the position in the epoch where each window ends."""
        if epoch not in self._epochs:
            shards = self._permuted_shards(epoch)
            place = np.empty_like(shards)
            place[shards] = np.arange(len(shards))
            blocks = _permutation(np.arange(len(self._sizes)), self._seed, epoch, _BLOCKS)
            group = place[self._shard_of_block[blocks]] // self._group_shards
            blocks = blocks[np.argsort(group, kind="stable")]
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


class MixedOrder:
    """The orders of several corpora run together by weight; the records of each are numbered after the last one's.

    An epoch is as long as all corpora together. In it corpus i has `quotas[i]` positions, spread evenly: each of its
    records comes once where the weights are the corpora's lengths, otherwise its own order goes on in the next epoch.
    Every `_CYCLE` positions, about, are permuted among the corpora.
    """

    def __init__(
        self,
        orders: Sequence[GlobalOrder],
        num_records: Sequence[int],
        weights: Sequence[float],
        *,
        seed: int,
    ) -> None:
        """`num_records` are those of each corpus, eligible or not; `weights` are positive, of any sum."""
        self._orders = orders
        self._starts = np.concatenate([[0], np.cumsum(num_records, dtype=np.int64)]).tolist()
        self._length = sum(map(len, orders))
        self._seed = seed
        self.quotas = _quotas(weights, self._length)
        cycles = -(-self._length // _CYCLE)
        steps = np.arange(cycles + 1, dtype=np.int64)
        self._counts = np.stack([-(-quota * steps // cycles) for quota in self.quotas])
        """[corpora, cycles + 1]: positions of each corpus before each cycle"""
        self._bounds = self._counts.sum(axis=0)
        self._cycles: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """Positions of an epoch."""
        return self._length

    @property
    def window_blocks(self) -> int:
        """Blocks of one corpus that are in use together."""
        return max(order.window_blocks for order in self._orders)

    def indices(self, start: int, stop: int) -> NDArray[np.int64]:
        """Records at positions start, ..., stop - 1: [stop - start] int64."""
        parts = []
        while start < stop:
            cycle, offset = self._find(start)
            _, records = self._cycle(cycle)
            part = records[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def upcoming(self, position: int) -> list[Upcoming]:
        """Of each corpus, the shards that are read from about a position on."""
        cycle, _ = self._find(position)
        starts = (self._first(cycle, corpus) for corpus in range(len(self._orders)))
        return [
            one for order, start in zip(self._orders, starts, strict=True) for one in order.upcoming(start)
        ]

    def stand_in(self, position: int, attempt: int) -> int:
        """A record of the same corpus in place of one that cannot be read."""
        cycle, offset = self._find(position)
        corpora, _ = self._cycle(cycle)
        corpus = int(corpora[offset])
        own = self._first(cycle, corpus) + int((corpora[:offset] == corpus).sum())
        return self._orders[corpus].stand_in(own, attempt) + int(self._starts[corpus])

    def _find(self, position: int) -> tuple[int, int]:
        """The cycle since the beginning, and the place in it."""
        epoch, offset = divmod(position, self._length)
        cycle = int(np.searchsorted(self._bounds, offset, side="right")) - 1
        return epoch * (len(self._bounds) - 1) + cycle, offset - int(self._bounds[cycle])

    def _first(self, cycle: int, corpus: int) -> int:
        """Where the corpus's own order stands when a cycle begins."""
        epoch, number = divmod(cycle, len(self._bounds) - 1)
        return epoch * self.quotas[corpus] + int(self._counts[corpus, number])

    def _cycle(self, cycle: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of the positions of a cycle, the corpus and the record."""
        if cycle not in self._cycles:
            number = cycle % (len(self._bounds) - 1)
            counts = self._counts[:, number + 1] - self._counts[:, number]
            corpora = np.repeat(np.arange(len(counts)), counts)
            corpora = corpora[_permutation(np.arange(len(corpora)), self._seed, cycle, _CORPORA)]
            records = np.empty(len(corpora), dtype=np.int64)
            for corpus, count in enumerate(counts.tolist()):
                first = self._first(cycle, corpus)
                own = self._orders[corpus].indices(first, first + count)
                records[corpora == corpus] = own + self._starts[corpus]
            _keep_two(self._cycles, cycle, (corpora, records))
        return self._cycles[cycle]


def _quotas(weights: Sequence[float], total: int) -> list[int]:
    """`total` shared out by weight, to the last one: exact where the weights themselves sum to it."""
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    quotas = [max(1, int(share)) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (exact[i] - quotas[i], -i), reverse=True)
    for i in by_rest[: max(0, total - sum(quotas))]:
        quotas[i] += 1
    quotas[int(np.argmax(quotas))] -= max(0, sum(quotas) - total)  # what the least share of one took
    return quotas


def _permutation(items: NDArray[np.int64], seed: int, epoch: int, stream: int) -> NDArray[np.int64]:
    """`items` in the order of a hash of each: numpy's own shuffles may change between its versions."""
    return items[np.argsort(_hashes(items, seed, epoch, stream), kind="stable")]


def _hashes(items: NDArray[np.int64], seed: int, epoch: int, stream: int) -> NDArray[np.uint64]:
    """The outputs of SplitMix64 at index `item`, seeded by the other arguments.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    key = 0
    for value in (seed, epoch, stream):
        key = int(_mix(np.array([(key ^ value) + _GOLDEN_RATIO & _MASK], dtype=np.uint64))[0])
    return _mix(np.uint64(key) + items.astype(np.uint64) * np.uint64(_GOLDEN_RATIO))


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _keep_two(cache: dict[K, V], key: K, value: V) -> None:
    """A batch may straddle two windows or epochs; more than two are never needed again."""
    if len(cache) == 2:
        del cache[next(iter(cache))]
    cache[key] = value
