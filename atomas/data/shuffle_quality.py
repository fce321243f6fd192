"""How well the order of training mixes a corpus whose shards are sorted, measured on the order itself."""

from dataclasses import dataclass

import numpy as np

from atomas.data.order import GlobalOrder
from atomas.data.shards import ShardedSplit

MAX_POSITIONS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class ShuffleQuality:
    """Of consecutive samples of one epoch; a record's number is its rank where the shards are sorted."""

    positions: int
    """Samples that were looked at, from the beginning of the epoch."""
    neighbours: float
    """Correlation of the numbers of a sample and the next one: 0 in a perfect shuffle, 1 without any."""
    noise: float
    """Standard deviation of that correlation in a perfect shuffle."""
    same_block: float
    """Share of samples that lie in the same block as the one before."""
    drift: float
    """Correlation of a sample's number with its position in the epoch."""


def measure_shuffle(
    split: ShardedSplit, *, seed: int = 0, window_blocks: int = 64, group_shards: int = 64
) -> ShuffleQuality:
    """Look at the first epoch of the order with which a run would read `split`, nothing left out."""
    order = GlobalOrder(
        split.blocks.num_records,
        seed=seed,
        window_blocks=window_blocks,
        shard_sizes=[len(shard.blocks) for shard in split.shards],
        group_shards=group_shards,
    )
    numbers = order.indices(0, min(len(order), MAX_POSITIONS))
    blocks = np.searchsorted(np.cumsum(split.blocks.num_records), numbers, side="right")
    return ShuffleQuality(
        positions=len(numbers),
        neighbours=_correlation(numbers[:-1], numbers[1:]),
        noise=1 / np.sqrt(max(1, len(numbers) - 1)),
        same_block=float((blocks[1:] == blocks[:-1]).mean()) if len(numbers) > 1 else 0.0,
        drift=_correlation(numbers, np.arange(len(numbers))),
    )


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    if len(one) < 2 or one.std() == 0 or other.std() == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])
