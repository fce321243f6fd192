"""Fractions in whole groups."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atomas.data.splitting import SplitBy, count_repeated, count_shared, split_by_fractions

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), min_size=1, max_size=200),
    st.sampled_from(["random", "scaffold"]),
    st.integers(0, 3),
)
def test_groups_stay_together(rows: list[tuple[int, int]], by: SplitBy, seed: int) -> None:
    molecules, scaffolds = [row[0] for row in rows], [row[1] for row in rows]
    split = split_by_fractions(molecules, scaffolds, FRACTIONS, by=by, seed=seed)
    assert len(split) == len(rows)
    splits_of_molecule = {m: {s for n, s in zip(molecules, split, strict=True) if n == m} for m in molecules}
    assert all(len(found) == 1 for found in splits_of_molecule.values())
    if by == "scaffold":
        first_scaffold: dict[int, int] = {}
        groups = [first_scaffold.setdefault(m, s) for m, s in rows]
        of_group: dict[int, set[str]] = {}
        for group, name in zip(groups, split, strict=True):
            of_group.setdefault(group, set()).add(name)
        assert all(len(found) == 1 for found in of_group.values())


def test_fractions_are_met_and_order_does_not_matter() -> None:
    molecules = list(range(1000))
    split = split_by_fractions(molecules, molecules, FRACTIONS, by="random", seed=0)
    assert Counter(split) == {"train": 800, "validation": 100, "test": 100}
    backwards = split_by_fractions(molecules[::-1], molecules, FRACTIONS, by="random", seed=0)
    assert backwards[::-1] == split
    assert split_by_fractions(molecules, molecules, FRACTIONS, by="random", seed=1) != split


def test_large_scaffolds_go_to_the_large_split() -> None:
    scaffolds = [0] * 70 + [1] * 10 + list(range(2, 22))
    fractions = {"test": 0.2, "train": 0.8}
    split = split_by_fractions(list(range(100)), scaffolds, fractions, by="scaffold", seed=0)
    assert split[:80] == ["train"] * 80
    assert split[80:] == ["test"] * 20


def test_counting() -> None:
    one, other = np.array([1, 1, 2, 3, 3, 3], dtype=np.uint64), np.array([3, 3, 4], dtype=np.uint64)
    assert count_repeated(one) == 5
    assert count_shared(one, other) == 1
