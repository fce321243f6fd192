"""The global order: pinned, complete in every epoch, well mixed, and a pure function of the position."""

import itertools
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atomas.data.order import ORDER_VERSION, GlobalOrder, MixedOrder

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
    assert ORDER_VERSION == "order_v2", "a new version pins new ids"
    assert order.indices(0, 64).tolist() == FIRST_64


orders = st.fixed_dictionaries(
    {
        "block_sizes": st.lists(st.integers(1, 9), min_size=1, max_size=12),
        "seed": st.integers(0, 2**63),
        "window_blocks": st.integers(1, 14),
        "group_shards": st.integers(1, 5),
    }
)


def cut_into_shards(case: dict[str, Any], random: Random) -> dict[str, Any]:
    """The same blocks in shards of 1 to 4 of them."""
    left, sizes = len(case["block_sizes"]), []
    while left:
        sizes.append(random.randint(1, min(4, left)))
        left -= sizes[-1]
    return case | {"shard_sizes": sizes}


@given(orders, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_every_epoch_holds_each_eligible_record_once(case: dict[str, Any], random: Random) -> None:
    count = sum(case["block_sizes"])
    eligible = np.array([random.random() < 0.7 for _ in range(count)])
    eligible[random.randrange(count)] = True
    order = GlobalOrder(**cut_into_shards(case, random), eligible=eligible)
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


def test_shards_of_a_group_are_used_once_in_an_epoch() -> None:
    order = GlobalOrder([10] * 60, seed=3, window_blocks=5, shard_sizes=[4] * 15, group_shards=3)
    for epoch in range(2):
        shards = order.indices(epoch * 600, (epoch + 1) * 600) // 40
        for shard in range(15):
            (places,) = np.nonzero(shards == shard)
            assert places[-1] - places[0] < 120 + 2 * 50, (
                "a group, and the windows that reach across its ends"
            )
    whole = GlobalOrder([10] * 60, seed=3, window_blocks=5, shard_sizes=[4] * 15, group_shards=15)
    assert (
        whole.indices(0, 600).tolist()
        == GlobalOrder([10] * 60, seed=3, window_blocks=5).indices(0, 600).tolist()
    )


# fmt: off
MIXED_64 = [
    2185, 89, 61, 1363, 97, 96, 197, 2681, 60, 98, 105, 170,
    107, 62, 2337, 94, 111, 403, 195, 57, 99, 59, 88, 1827,
    58, 56, 102, 103, 63, 173, 1096, 95, 2820, 109, 2481, 2155,
    2427, 2455, 110, 171, 2909, 1128, 108, 1743, 104, 2119, 1553, 91,
    174, 106, 198, 1254, 162, 320, 90, 92, 161, 2123, 93, 164,
    2226, 2221, 809, 191,
]
# fmt: on


def mixed(weights: list[float], seed: int = 17) -> MixedOrder:
    orders = [
        GlobalOrder([8] * 20, seed=1, window_blocks=4),
        GlobalOrder([5] * 9, seed=2, window_blocks=2, eligible=np.arange(45) % 3 > 0),
        GlobalOrder([3000] * 4, seed=3, window_blocks=1),
    ]
    return MixedOrder(orders, [160, 45, 12_000], weights, seed=seed)


def test_the_first_ids_of_a_mixture_are_pinned() -> None:
    assert mixed([3, 1, 2]).indices(0, 64).tolist() == MIXED_64


def test_corpora_weighted_by_length_are_one_corpus() -> None:
    order = mixed([160, 30, 12_000])
    expected = [*range(160), *(160 + np.flatnonzero(np.arange(45) % 3 > 0)), *range(205, 12_205)]
    for epoch in range(3):
        records = order.indices(epoch * len(order), (epoch + 1) * len(order))
        assert sorted(records.tolist()) == expected


@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
@settings(deadline=None, max_examples=30)
def test_a_mixture_keeps_to_its_weights_everywhere_and_repeats_evenly(weights: list[float]) -> None:
    order = mixed(weights)
    assert sum(order.quotas) == len(order)
    records = order.indices(0, 2 * len(order))
    corpus = np.searchsorted([160, 205], records, side="right")
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        drawn = np.cumsum(corpus == number)[4095::4096]
        expected = share * 4096 * np.arange(1, len(drawn) + 1)
        assert np.abs(drawn - expected).max() <= 4096 * 0.05 + 4, "any stretch of some cycles has its share"
        _, times = np.unique(records[corpus == number], return_counts=True)
        if len(times) == (160, 30, 12_000)[number]:
            assert times.max() - times.min() <= 1, (
                "no record comes again before every other has come as often"
            )


@given(st.lists(st.integers(0, 30_000), min_size=2, max_size=6))
@settings(deadline=None, max_examples=30)
def test_a_mixture_is_a_function_of_the_position(cuts: list[int]) -> None:
    bounds = sorted(cuts)
    order = mixed([1, 1, 5])
    pieces = [order.indices(start, stop) for start, stop in itertools.pairwise(bounds)][::-1]
    assert np.concatenate(pieces[::-1]).tolist() == mixed([1, 1, 5]).indices(bounds[0], bounds[-1]).tolist()


def test_stand_ins_are_of_the_same_corpus_and_first_of_the_same_window() -> None:
    order = mixed([3, 1, 2])
    records = order.indices(0, 500)
    for position in range(0, 500, 17):
        corpus = np.searchsorted([160, 205], records[position], side="right")
        found = [order.stand_in(position, attempt) for attempt in range(12)]
        assert found == [order.stand_in(position, attempt) for attempt in range(12)]
        assert {int(np.searchsorted([160, 205], one, side="right")) for one in found} == {int(corpus)}
        assert len(set(found)) > 3
    plain = GlobalOrder([8] * 40, seed=5, window_blocks=4)
    window = set(plain.indices(32, 64).tolist())
    assert {plain.stand_in(40, attempt) for attempt in range(8)} <= window
    assert not {plain.stand_in(40, attempt) for attempt in range(8, 40)} <= window
