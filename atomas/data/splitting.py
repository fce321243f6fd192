"""Splits by fraction, in whole groups: a molecule, or a scaffold, never lies in two splits."""

from collections.abc import Mapping
from itertools import accumulate
from typing import Literal

SplitBy = Literal["random", "scaffold"]


def split_query(fractions: Mapping[str, float], by: SplitBy, seed: int) -> str:
    """SQL that gives table `records` with the number of the split as the outcome of every record that is kept.

    Groups are put in a line, which is cut at the fractions; a group goes where its middle lies. "random" orders
    molecules by a hash of (seed, molecule). "scaffold" orders scaffolds by size, largest first, and cuts the largest
    split first, so that small splits hold rare scaffolds (as MoleculeNet does, arXiv 1703.00564); equal sizes by hash.
    """
    names = list(fractions)
    if by == "scaffold":
        names.sort(key=lambda name: -fractions[name])
    ends = list(accumulate(fractions[name] for name in names))[:-1]
    numbers = [list(fractions).index(name) for name in names]
    cases = "".join(
        f"WHEN middle <= {end!r} * total THEN {number} " for end, number in zip(ends, numbers, strict=False)
    )
    order = "size DESC, hash" if by == "scaffold" else "hash"
    # One InChIKey can cover tautomers with different scaffolds: the first one seen counts.
    group = "arg_min(scaffold, ord)" if by == "scaffold" else "molecule"
    return f"""
        WITH molecules AS (
            SELECT molecule, {group} AS key, count(*) AS size FROM records WHERE outcome >= 0 GROUP BY molecule
        ), placed AS (
            SELECT key, sum(size) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) - size / 2 AS middle,
                (SELECT sum(size) FROM molecules) AS total
            FROM (
                SELECT key, sum(size) AS size, sha256(concat('{int(seed)}:', key)) AS hash
                FROM molecules GROUP BY key
            )
        ), assigned AS (
            SELECT molecule, CASE {cases or "WHEN false THEN 0 "}ELSE {numbers[-1]} END AS split
            FROM molecules JOIN placed USING (key)
        )
        SELECT records.* REPLACE (if(outcome >= 0, split, outcome) AS outcome)
        FROM records LEFT JOIN assigned USING (molecule)
    """
