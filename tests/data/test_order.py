"""The global order: pinned, complete in every epoch, well mixed, and a pure function of the position."""

import itertools
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atomas.data.order import ORDER_VERSION, GlobalOrder

# fmt: off
FIRST_64 = [
    34, 115, 145, 151, 36, 60, 144, 57, 59, 33, 118, 63, 116, 39, 32, 148,
    114, 56, 58, 147, 113, 112, 37, 62, 149, 146, 35, 150, 119, 117, 38, 61,
    53, 29, 48, 85, 28, 83, 135, 30, 50, 51, 84, 54, 25, 132, 24, 49,
    86, 87, 81, 55, 80, 31, 134, 130, 133, 129, 27, 131, 82, 52, 128, 26,
]
# fmt: on


def test_the_first_ids_are_pinned() -> None:
    order = GlobalOrder([8] * 20, seed=17, window_blocks=4)
    assert ORDER_VERSION == "order_v1", "a new version pins new ids"
    assert order.indices(0, 64).tolist() == FIRST_64


orders = st.fixed_dictionaries(
    {
        "block_sizes": st.lists(st.integers(1, 9), min_size=1, max_size=12),
        "seed": st.integers(0, 2**63),
        "window_blocks": st.integers(1, 14),
    }
)


@given(orders, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_every_epoch_holds_each_eligible_record_once(case: dict[str, Any], random: Random) -> None:
    count = sum(case["block_sizes"])
    eligible = np.array([random.random() < 0.7 for _ in range(count)])
    eligible[random.randrange(count)] = True
    order = GlobalOrder(**case, eligible=eligible)
    size = len(order)
    assert size == eligible.sum()
    for epoch in range(3):
        records = order.indices(epoch * size, (epoch + 1) * size)
        assert sorted(records) == np.flatnonzero(eligible).tolist()


@given(orders, st.lists(st.integers(0, 300), min_size=2, max_size=6))
@settings(deadline=None)
def test_any_way_of_cutting_the_stream_gives_the_same_stream(case: dict[str, Any], cuts: list[int]) -> None:
    start, *_, stop = ends = sorted(cuts)
    whole = GlobalOrder(**case).indices(start, stop)
    order = GlobalOrder(**case)
    pieces = [order.indices(a, b) for a, b in itertools.pairwise(ends)]
    assert np.concatenate(pieces).tolist() == whole.tolist()
    assert whole.dtype == np.int64


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> np.ndarray:
        order = GlobalOrder([16] * 16, seed=seed, window_blocks=4)
        return order.indices(number * 256, (number + 1) * 256)

    first = epoch(0, 0)
    for other in (epoch(0, 1), epoch(1, 0), epoch(2**40, 0)):
        assert (first == other).mean() < 0.05


def test_only_one_window_of_blocks_is_needed_at_a_time() -> None:
    order = GlobalOrder([10] * 30, seed=3, window_blocks=5)
    for window in order.indices(0, 300).reshape(6, 50):
        assert len(np.unique(window // 10)) == 5


@pytest.mark.parametrize("window_blocks", [4, 64])
def test_records_are_mixed_like_random_ones(window_blocks: int) -> None:
    order = GlobalOrder([64] * 64, seed=5, window_blocks=window_blocks)
    count = len(order)
    records = order.indices(0, count)
    position = np.empty(count)
    position[records] = np.arange(count)
    assert abs(np.corrcoef(position, np.arange(count))[0, 1]) < (0.4 if window_blocks == 4 else 0.06)
    # Two neighbours in a shuffled window of w blocks come from one block with a chance of 63 / (64 w - 1).
    expected = (64 - 1) / (64 * window_blocks - 1)
    same_block = (records[1:] // 64 == records[:-1] // 64).mean()
    assert same_block == pytest.approx(expected, abs=0.06)
    # The order inside a window is uniform: each block's mean place is the middle of its window.
    inside = np.arange(count) % (64 * window_blocks) / (64 * window_blocks)
    means = np.bincount(records // 64, weights=inside) / 64
    assert np.abs(means - 0.5).max() < 4.5 * np.sqrt(1 / 12 / 64)


def test_windows_without_an_eligible_record_are_passed_over() -> None:
    eligible = np.zeros(60, dtype=bool)
    eligible[[3, 41]] = True
    order = GlobalOrder([10] * 6, seed=0, window_blocks=1, eligible=eligible)
    stream = order.indices(0, 8).reshape(4, 2)
    assert all(sorted(epoch) == [3, 41] for epoch in stream)
