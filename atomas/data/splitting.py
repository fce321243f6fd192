"""Splits by fraction, in whole groups: a molecule, or a scaffold, never lies in two splits."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

SplitBy = Literal["random", "scaffold"]
Identities = npt.NDArray[np.uint64]


def split_by_fractions(
    molecules: Sequence[int],
    scaffolds: Sequence[int],
    fractions: Mapping[str, float],
    *,
    by: SplitBy,
    seed: int,
) -> list[str]:
    """The split of each record, given the identities of its molecule and (for "scaffold") its scaffold.

    Groups are put in a line, which is cut at the fractions; a group goes where its middle lies.
    "random" orders molecules by a hash of (seed, molecule). "scaffold" orders scaffolds by size, largest
    first, and cuts the largest split first, so that small splits hold rare scaffolds (as MoleculeNet
    does, arXiv 1703.00564); equal sizes by hash.
    """
    groups = list(molecules)
    if by == "scaffold":
        # One InChIKey can cover tautomers with different scaffolds: the first one seen counts.
        scaffold_of: dict[int, int] = {}
        groups = [scaffold_of.setdefault(m, s) for m, s in zip(molecules, scaffolds, strict=True)]
    sizes = Counter(groups)

    def position(group: int) -> tuple[int, bytes]:
        digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
        return (-sizes[group] if by == "scaffold" else 0, digest)

    names = sorted(fractions, key=lambda name: -fractions[name]) if by == "scaffold" else list(fractions)
    ends = np.cumsum([fractions[name] for name in names]) * len(groups)
    split_of: dict[int, str] = {}
    placed = 0
    for group in sorted(sizes, key=position):
        middle = placed + sizes[group] / 2
        split_of[group] = names[min(int(np.searchsorted(ends, middle)), len(names) - 1)]
        placed += sizes[group]
    return [split_of[group] for group in groups]


def count_repeated(identities: Identities) -> int:
    """How many elements occur more than once (all occurrences counted)."""
    _, counts = np.unique(identities, return_counts=True)
    return int(counts[counts > 1].sum())


def count_shared(first: Identities, second: Identities) -> int:
    """How many different identities occur in both."""
    return len(np.intersect1d(first, second))
