"""The blocks of a split that were used last, decoded; those that cannot be read, with the reason."""

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from atomas.data.bad_samples import BlockError
from atomas.data.shards import ShardedSplit

B = TypeVar("B")


class BlockCache(Generic[B]):
    """Blocks of `split` as `decode` makes them of a block's number; about `size` of them are kept."""

    def __init__(self, split: ShardedSplit, decode: Callable[[int], B], size: int) -> None:
        self._starts = np.concatenate([[0], np.cumsum(split.blocks.num_records, dtype=np.int64)])
        self._decode = decode
        self._size = size
        self._blocks: OrderedDict[int, B | BlockError] = OrderedDict()

    def locate(self, members: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of records, the numbers of their blocks and their rows in them."""
        numbers = np.searchsorted(self._starts, members, side="right") - 1
        return numbers, members - self._starts[numbers]

    def load(self, members: NDArray[np.int64]) -> dict[int, BlockError]:
        """Have the blocks of all these records at once; errors of those that cannot be read, by block number."""
        wanted = np.unique(self.locate(members)[0]).tolist()
        # Each process begins elsewhere, so that those of a node fetch different shards at a time.
        turn = os.getpid() % len(wanted) if wanted else 0
        for number in wanted[turn:] + wanted[:turn]:
            self._touch(number)
        while len(self._blocks) > max(self._size, len(wanted)):
            self._blocks.popitem(last=False)
        found = {number: self._blocks[number] for number in wanted}
        return {number: block for number, block in found.items() if isinstance(block, BlockError)}

    def __getitem__(self, number: int) -> B:
        """One block; raises BlockError where it cannot be read."""
        is_new = number not in self._blocks
        block = self._touch(number)
        # not where `load` has gone beyond the size: that would drop what the same batch is about to read
        if is_new and len(self._blocks) > self._size:
            self._blocks.popitem(last=False)
        if isinstance(block, BlockError):
            raise block
        return block

    def _touch(self, number: int) -> B | BlockError:
        if number not in self._blocks:
            try:
                self._blocks[number] = self._decode(number)
            except BlockError as error:
                self._blocks[number] = error
        self._blocks.move_to_end(number)
        return self._blocks[number]
