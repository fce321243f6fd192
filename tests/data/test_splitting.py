"""Fractions in whole groups."""

from collections import Counter
from collections.abc import Mapping, Sequence

import duckdb
from hypothesis import given, settings
from hypothesis import strategies as st

from atomas.data.splitting import SplitBy, split_query

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def split_rows(
    molecules: Sequence[int],
    scaffolds: Sequence[int],
    fractions: Mapping[str, float],
    *,
    by: SplitBy,
    seed: int,
) -> list[str]:
    with duckdb.connect() as database:
        database.execute(
            "CREATE TABLE records (ord BIGINT, molecule BIGINT, scaffold BIGINT, outcome INTEGER)"
        )
        rows = [[ord_, *pair, 0] for ord_, pair in enumerate(zip(molecules, scaffolds, strict=True))]
        database.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", rows)
        database.execute("INSERT INTO records VALUES (1000000, 0, 99, -1)")  # left out: counts for nothing
        found = database.execute(
            f"SELECT outcome FROM ({split_query(fractions, by, seed)}) ORDER BY ord"
        ).fetchall()
    assert found.pop() == (-1,)
    return [list(fractions)[number] for (number,) in found]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), min_size=1, max_size=200),
    st.sampled_from(["random", "scaffold"]),
    st.integers(0, 3),
)
def test_groups_stay_together(rows: list[tuple[int, int]], by: SplitBy, seed: int) -> None:
    molecules, scaffolds = [row[0] for row in rows], [row[1] for row in rows]
    split = split_rows(molecules, scaffolds, FRACTIONS, by=by, seed=seed)
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
    split = split_rows(molecules, molecules, FRACTIONS, by="random", seed=0)
    assert Counter(split) == {"train": 800, "validation": 100, "test": 100}
    backwards = split_rows(molecules[::-1], molecules, FRACTIONS, by="random", seed=0)
    assert backwards[::-1] == split
    assert split_rows(molecules, molecules, FRACTIONS, by="random", seed=1) != split


def test_large_scaffolds_go_to_the_large_split() -> None:
    scaffolds = [0] * 70 + [1] * 10 + list(range(2, 22))
    fractions = {"test": 0.2, "train": 0.8}
    split = split_rows(list(range(100)), scaffolds, fractions, by="scaffold", seed=0)
    assert split[:80] == ["train"] * 80
    assert split[80:] == ["test"] * 20


def test_one_split_takes_all() -> None:
    assert split_rows([1, 2, 3], [0, 0, 0], {"all": 1.0}, by="random", seed=0) == ["all"] * 3
