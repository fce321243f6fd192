"""Stage 3: what only the whole corpus knows, worked out in SQL by DuckDB, which goes to disk when memory is short.

A record's place is `ord`: part << 32 | row within the records of the part, so that places sort as the input does. Its
outcome is the number of its split, or why it is left out (a negative number). Every result is an aggregate or is
sorted by place: it does not depend on threads, memory or the size of the parts.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atomas.data.alignment_check import MAX_ROWS
from atomas.data.building.counting import count_all
from atomas.data.building.database import Array, batches, count, open_database, replace_records
from atomas.data.building.examine import KEYS, SUMMARY
from atomas.data.building.outcomes import DUPLICATE, EXCLUDED, describe_outcome
from atomas.data.building.plan import Plan, PlannedPart
from atomas.data.shard_writer import BLOCK_SIZE, SHARD_BYTES
from atomas.data.splitting import split_query
from atomas.errors import AtomasError
from atomas.json_files import write_json

DECISIONS = "decisions"
RESULT = "result.json"


def resolve(folder: Path, memory_mb: int, number: int) -> None:
    """Decide on every record; leave decisions, the plan of the shards and the counts. There is one task, `number` 0."""
    plan = Plan.load(folder)
    parts = plan.parts()
    out = folder / "resolve"
    shutil.rmtree(out, ignore_errors=True)
    (out / DECISIONS).mkdir(parents=True)
    summaries = _summaries(plan, parts)
    with open_database(out / "work.duckdb", memory_mb) as database:
        _load(database, plan, parts)
        if not count(database, "records"):
            raise AtomasError(
                f"no usable pair in {', '.join(one.file.name for one in plan.pair_files)}: the corpus would be empty "
                f"({sum(one['rows'] for one in summaries)} rows; "
                f"{_first_rejection(summaries) or 'no row after the header'})"
            )
        _leave_out(database, plan)
        first = _first_rejection(summaries, _first_dropped(database, plan))
        if not count(database, "records WHERE outcome >= 0"):
            raise AtomasError(
                f"no usable pair in {', '.join(one.file.name for one in plan.pair_files)}: the corpus would be empty "
                f"({sum(one['rows'] for one in summaries)} rows; {first})"
            )
        if plan.recipe.fractions is not None:
            replace_records(database, split_query(plan.recipe.fractions, plan.recipe.by, plan.recipe.seed))
        _check_splits(database, plan, first)
        layout = _Layout(len(parts), len(plan.split_names))
        _write_decisions(database, parts, out / DECISIONS, layout)
        result = {
            "shards": layout.shards(),
            "records_of_parts": layout.of_parts.tolist(),
            "samples": [_sample(database, number) for number in range(len(plan.pair_files))],
            **count_all(database, plan, summaries),
        }
    write_json(out / RESULT, result)
    for path in out.glob("work.duckdb*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _summaries(plan: Plan, parts: Sequence[PlannedPart]) -> list[dict[str, Any]]:
    """The summaries of the parts of pair files, with the number of their file and part."""
    return [
        {
            "file": one.file,
            "part": number,
            **json.loads((plan.part_folder(number) / SUMMARY).read_text(encoding="utf-8")),
        }
        for number, one in enumerate(parts)
        if plan.inputs[one.file].split is not None
    ]


def _load(database: Any, plan: Plan, parts: Sequence[PlannedPart]) -> None:
    """Tables `records` (outcome 0) and `excluded`."""
    database.execute(
        "CREATE TABLE records (ord BIGINT, source INTEGER, outcome INTEGER, line BIGINT, bytes BIGINT, "
        "molecule BIGINT, skeleton BIGINT, text BIGINT, scaffold BIGINT, hazards BIGINT)"
    )
    database.execute("CREATE TABLE excluded (molecule BIGINT, skeleton BIGINT, reference INTEGER)")
    first_reference = len(plan.pair_files)
    for number, one in enumerate(parts):
        path = str(plan.part_folder(number) / KEYS)
        if one.file < first_reference:
            split = (
                plan.split_names.index(plan.inputs[one.file].split) if plan.recipe.fractions is None else 0
            )
            database.execute(
                "INSERT INTO records SELECT (?::BIGINT << 32) | file_row_number, ?, ?, line, bytes, "
                "molecule, skeleton, text, scaffold, hazards FROM read_parquet(?, file_row_number = true)",
                [number, one.file, split, path],
            )
        else:
            database.execute(
                "INSERT INTO excluded SELECT molecule, skeleton, ? FROM read_parquet(?)",
                [one.file - first_reference, path],
            )
    for reference in range(len(plan.references)):
        if not count(database, f"excluded WHERE reference = {reference}"):
            raise AtomasError(f"--exclude {plan.recipe.exclude[reference]} holds no valid molecule")


def _leave_out(database: Any, plan: Plan) -> None:
    """Outcomes of excluded molecules, then of duplicates, criterion by criterion."""
    recipe = plan.recipe
    if recipe.exclude:
        by = recipe.exclude_by
        replace_records(
            database,
            f"SELECT records.* REPLACE (coalesce({EXCLUDED} - found.reference, outcome) AS outcome) FROM records "
            f"LEFT JOIN (SELECT {by}, min(reference) AS reference FROM excluded GROUP BY {by}) found USING ({by})",
        )
    for criterion in recipe.deduplicate:
        key = "molecule, text" if criterion == "pair" else criterion
        database.execute(
            f"CREATE TABLE first AS SELECT min(ord) AS ord, true AS is_first FROM records WHERE outcome >= 0 "
            f"GROUP BY outcome, {key}"
        )
        replace_records(
            database,
            f"SELECT records.* REPLACE (if(outcome >= 0 AND is_first IS NULL, {DUPLICATE[criterion]}, outcome) "
            "AS outcome) FROM records LEFT JOIN first USING (ord)",
        )
        database.execute("DROP TABLE first")


def _first_dropped(database: Any, plan: Plan) -> tuple[int, str] | None:
    found = database.execute(
        "SELECT ord >> 32, line, outcome FROM records WHERE outcome < 0 ORDER BY ord LIMIT 1"
    ).fetchone()
    return (found[0], f"line {found[1]}: {describe_outcome(found[2], plan)[1]}") if found else None


def _first_rejection(summaries: Sequence[Mapping[str, Any]], dropped: tuple[int, str] | None = None) -> str:
    rejected = next(
        ((one["part"], one["first_rejection"]) for one in summaries if one["first_rejection"]), None
    )
    found = [one for one in (rejected, dropped) if one is not None]
    return min(found)[1] if found else ""


def _check_splits(database: Any, plan: Plan, first_rejection: str) -> None:
    kept = dict(
        database.execute("SELECT outcome, count(*) FROM records WHERE outcome >= 0 GROUP BY 1").fetchall()
    )
    for number, name in enumerate(plan.split_names):
        if not kept.get(number):
            raise AtomasError(
                f"split {name!r} would be empty ({sum(kept.values())} usable pairs in all; "
                f"{first_rejection or 'nothing rejected'}): give it more data or a larger fraction"
            )


class _Layout:
    """Where shards begin: after the block that takes one past SHARD_BYTES of records, known from their lengths."""

    def __init__(self, num_parts: int, num_splits: int) -> None:
        self.of_parts = np.zeros((num_parts, num_splits), dtype=np.int64)
        self._records = [0] * num_splits
        self._bytes = [0] * num_splits
        self._ends: list[list[int]] = [[] for _ in range(num_splits)]

    def add(self, part: Array, outcome: Array, lengths: Array) -> None:
        """The next records, in order."""
        for split in range(len(self._records)):
            inside = outcome == split
            if not inside.any():
                continue
            np.add.at(self.of_parts[:, split], part[inside], 1)
            total = self._bytes[split] + np.cumsum(lengths[inside])
            number = self._records[split] + np.arange(1, len(total) + 1)
            at_block_end = np.flatnonzero(number % BLOCK_SIZE == 0)
            done = 0
            while True:
                past = at_block_end[total[at_block_end] - done >= SHARD_BYTES]
                if not len(past):
                    break
                self._ends[split].append(int(number[past[0]]))
                done = int(total[past[0]])
            self._records[split] += len(total)
            self._bytes[split] = int(total[-1]) - done

    def shards(self) -> list[dict[str, int]]:
        """Records [first, stop) of every shard of every split."""
        return [
            {"split": split, "number": number, "first": first, "stop": stop}
            for split, (ends, records) in enumerate(zip(self._ends, self._records, strict=True))
            for number, (first, stop) in enumerate(
                (first, stop)
                for first, stop in zip([0, *ends], [*ends, records], strict=True)
                if first < stop
            )
        ]


def _write_decisions(database: Any, parts: Sequence[PlannedPart], folder: Path, layout: _Layout) -> None:
    """One array of outcomes for each part, and the layout of the shards."""
    pending: list[Array] = []
    current = 0

    def finish(stop: int) -> None:
        nonlocal pending, current
        for number in range(current, stop):
            found = np.concatenate(pending) if pending else np.zeros(0)
            np.save(folder / f"{number:06d}.npy", found.astype(np.int32))
            pending = []
        current = stop

    for part, outcome, lengths in batches(
        database, "SELECT ord >> 32, outcome, bytes FROM records ORDER BY ord"
    ):
        layout.add(part, outcome, lengths)
        starts = np.flatnonzero(np.diff(part, prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(part)], strict=True):
            finish(int(part[start]))
            pending.append(outcome[start:stop])
    finish(len(parts))


def _sample(database: Any, source: int) -> list[list[int]]:
    """[part, row, line] of at most MAX_ROWS records of a source, evenly spaced, no molecule and no text twice."""
    database.execute(
        f"CREATE OR REPLACE TABLE distinct_records AS SELECT ord, line FROM records WHERE source = {source} AND "
        "outcome >= 0 "
        f"AND ord IN (SELECT min(ord) FROM records WHERE source = {source} AND outcome >= 0 GROUP BY molecule) "
        f"AND ord IN (SELECT min(ord) FROM records WHERE source = {source} AND outcome >= 0 GROUP BY text)"
    )
    total = count(database, "distinct_records")
    taken = np.arange(min(total, MAX_ROWS)) * total // max(1, min(total, MAX_ROWS))
    found, seen = [], 0
    for place, line in batches(database, "SELECT ord, line FROM distinct_records ORDER BY ord"):
        inside = taken[(taken >= seen) & (taken < seen + len(place))] - seen
        found += [
            [int(o) >> 32, int(o) & 0xFFFFFFFF, int(n)]
            for o, n in zip(place[inside], line[inside], strict=True)
        ]
        seen += len(place)
    return found
