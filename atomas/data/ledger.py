"""What a build remembers of its rows while the records themselves wait on disk: about 40 bytes a record."""

from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from atomas.data.hazards import HAZARDS
from atomas.data.records import Accepted, Rejected
from atomas.data.splitting import count_repeated, count_shared

PAIR_MIX = np.uint64(0x9E3779B97F4A7C15)


class Ledger:
    """Counts and identities of the rows of `num_sources` files, by source."""

    def __init__(self, num_sources: int) -> None:
        self.rows = [0] * num_sources
        self.rejected = [0] * num_sources
        self.excluded = [0] * num_sources
        self.hazards: list[Counter[str]] = [Counter() for _ in range(num_sources)]
        self.first_rejection = ""
        self._source = array("L")
        self._line = array("Q")
        self._molecule = array("Q")
        self._text = array("Q")
        self._scaffold = array("Q")

    def __len__(self) -> int:
        return len(self._source)

    def accept(self, source: int, row: Accepted, *, shares_skeleton: bool) -> None:
        """Note a record; `shares_skeleton`: an excluded molecule differs from it in stereo alone."""
        self.rows[source] += 1
        self.hazards[source].update(row.hazards)
        if shares_skeleton:
            self.hazards[source]["skeleton_leakage"] += 1
        self._source.append(source)
        self._line.append(row.line)
        self._molecule.append(row.molecule)
        self._text.append(row.text)
        self._scaffold.append(row.scaffold)

    def reject(self, source: int, row: Rejected) -> None:
        """Note a row that makes no record, or (hazard "leakage") must not."""
        self.rows[source] += 1
        self.hazards[source][row.hazard] += 1
        if row.hazard == "leakage":
            self.excluded[source] += 1
        else:
            self.rejected[source] += 1
        self.first_rejection = self.first_rejection or f"line {row.line}: {row.reason}"

    @property
    def source(self) -> npt.NDArray[np.int64]:
        """Number of the source of each record [N]."""
        return np.asarray(self._source, dtype=np.int64)

    @property
    def line(self) -> npt.NDArray[np.int64]:
        """Line of each record in its source [N]."""
        return np.asarray(self._line, dtype=np.int64)

    @property
    def molecule(self) -> npt.NDArray[np.uint64]:
        """Identity of each record's molecule [N]."""
        return np.asarray(self._molecule, dtype=np.uint64)

    @property
    def text(self) -> npt.NDArray[np.uint64]:
        """Identity of each record's text [N]."""
        return np.asarray(self._text, dtype=np.uint64)

    @property
    def scaffold(self) -> npt.NDArray[np.uint64]:
        """Identity of each record's scaffold [N] (0 where scaffolds were not asked for)."""
        return np.asarray(self._scaffold, dtype=np.uint64)

    def distinct_rows(self, source: int, limit: int) -> npt.NDArray[np.int64]:
        """At most `limit` records of one source, evenly spaced, no molecule and no text twice."""
        records = np.flatnonzero(self.source == source)
        _, first_molecule = np.unique(self.molecule[records], return_index=True)
        _, first_text = np.unique(self.text[records], return_index=True)
        distinct = records[np.intersect1d(first_molecule, first_text)]
        if len(distinct) <= limit:
            return distinct
        return distinct[np.arange(limit) * len(distinct) // limit]

    def total_hazards(self, split: npt.NDArray[np.int64]) -> dict[str, int]:
        """Every hazard's count over all sources; duplicates within splits (`split` [N]: their numbers)."""
        total = sum(self.hazards, Counter[str]())
        pair = self.molecule * PAIR_MIX ^ self.text
        for number in np.unique(split):
            inside = split == number
            total["duplicate_molecule"] += count_repeated(self.molecule[inside])
            total["duplicate_text"] += count_repeated(self.text[inside])
            total["duplicate_pair"] += count_repeated(pair[inside])
        return {name: total[name] for name in HAZARDS}

    def counts(self, split: npt.NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
        """The index's "counts": rows, splits, and what splits share (`names`: of the numbers in `split`)."""
        molecule, text = self.molecule, self.text
        inside = {name: split == number for number, name in enumerate(names)}
        return {
            "rows": sum(self.rows),
            "accepted": len(self),
            "rejected": sum(self.rejected),
            "excluded": sum(self.excluded),
            "splits": {
                name: {
                    "records": int(mask.sum()),
                    "molecules": len(np.unique(molecule[mask])),
                    "texts": len(np.unique(text[mask])),
                }
                for name, mask in inside.items()
            },
            "overlap": [
                {
                    "splits": [one, other],
                    "molecules": count_shared(molecule[inside[one]], molecule[inside[other]]),
                    "texts": count_shared(text[inside[one]], text[inside[other]]),
                }
                for one, other in combinations(names, 2)
            ],
        }
