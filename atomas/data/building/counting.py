"""What the index says in numbers: rows, hazards, splits and what they share, counted when all is decided."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from atomas.data.building.database import count
from atomas.data.building.outcomes import describe_outcome
from atomas.data.building.plan import Plan
from atomas.data.hazards import HAZARDS


def count_all(database: Any, plan: Plan, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The index's "counts" and "hazards", and what it says of every source."""
    hazards: list[Counter[str]] = [Counter() for _ in plan.pair_files]
    rows, rejected, excluded, dropped = ([0] * len(hazards) for _ in range(4))
    for one in summaries:
        hazards[one["file"]].update(one["rejected"])
        rows[one["file"]] += one["rows"]
        rejected[one["file"]] += sum(one["rejected"].values())
    bits = ", ".join(f"sum((hazards >> {bit}) & 1)" for bit in range(len(HAZARDS)))
    for source, *counts in database.execute(
        f"SELECT source, {bits} FROM records WHERE outcome >= 0 GROUP BY source"
    ).fetchall():
        hazards[source].update(
            {name: int(number) for name, number in zip(HAZARDS, counts, strict=True) if number}
        )
    for source, outcome, number in database.execute(
        "SELECT source, outcome, count(*) FROM records WHERE outcome < 0 GROUP BY ALL"
    ).fetchall():
        hazard, _ = describe_outcome(outcome, plan)
        hazards[source][hazard] += number
        (excluded if hazard == "leakage" else dropped)[source] += number
    for source, number in database.execute(
        "SELECT source, count(*) FROM records WHERE outcome >= 0 AND skeleton IN (SELECT skeleton FROM excluded) "
        "GROUP BY source"
    ).fetchall():
        hazards[source]["skeleton_leakage"] += number
    total = sum(hazards, Counter[str]())
    for name, key in (("molecule", "molecule"), ("text", "text"), ("pair", "molecule, text")):
        total[f"duplicate_{name}"] += int(
            database.execute(
                f"SELECT coalesce(sum(n), 0) FROM (SELECT count(*) AS n FROM records WHERE outcome >= 0 "
                f"GROUP BY outcome, {key}) WHERE n > 1"
            ).fetchone()[0]
        )
    sources = [
        {
            "rows": rows[number],
            "rejected": rejected[number],
            "excluded": excluded[number],
            "deduplicated": dropped[number],
            "hazards": {name: hazards[number][name] for name in sorted(hazards[number])},
            "records": _records_of_source(database, plan, number),
        }
        for number in range(len(hazards))
    ]
    return {
        "sources": sources,
        "hazards": {name: total[name] for name in HAZARDS},
        "counts": {
            "rows": sum(rows),
            "accepted": count(database, "records WHERE outcome >= 0"),
            "rejected": sum(rejected),
            "excluded": sum(excluded),
            "deduplicated": sum(dropped),
            "splits": {name: _count_split(database, number) for number, name in enumerate(plan.split_names)},
            "overlap": [
                {
                    "splits": [plan.split_names[one], plan.split_names[other]],
                    "molecules": _count_shared(database, "molecule", one, other),
                    "texts": _count_shared(database, "text", one, other),
                }
                for one, other in combinations(range(len(plan.split_names)), 2)
            ],
        },
    }


def _records_of_source(database: Any, plan: Plan, source: int) -> dict[str, int]:
    found = database.execute(
        "SELECT outcome, count(*) FROM records WHERE outcome >= 0 AND source = ? GROUP BY 1 ORDER BY 1",
        [source],
    ).fetchall()
    return {plan.split_names[split]: number for split, number in found}


def _count_split(database: Any, split: int) -> dict[str, int]:
    def distinct(column: str) -> int:
        return count(database, f"(SELECT DISTINCT {column} FROM records WHERE outcome = {split})")

    return {
        "records": count(database, f"records WHERE outcome = {split}"),
        "molecules": distinct("molecule"),
        "texts": distinct("text"),
    }


def _count_shared(database: Any, column: str, one: int, other: int) -> int:
    return count(
        database,
        f"(SELECT {column} FROM records WHERE outcome = {one} INTERSECT "
        f"SELECT {column} FROM records WHERE outcome = {other})",
    )
