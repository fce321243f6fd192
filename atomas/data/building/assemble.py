"""Stage 4: the records of every shard gathered from the parts; rejected rows in order; texts against molecules."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from atomas.data.alignment_check import check_alignment
from atomas.data.building.examine import KEYS, RECORDS, REJECTED, rejection_line
from atomas.data.building.outcomes import describe_outcome
from atomas.data.building.plan import Plan
from atomas.data.building.resolve import DECISIONS, RESULT
from atomas.data.records import Rejected
from atomas.data.row_formats import EXCERPT_LENGTH
from atomas.data.shard_writer import BLOCK_SIZE, ShardWriter
from atomas.data.shards import Record
from atomas.disk import sync
from atomas.json_files import write_json

REJECTED_NAME = "rejected.jsonl"
CORPUS, WRITTEN = "corpus", "write"


def num_tasks(plan: Plan, result: dict[str, Any]) -> int:
    """Every shard, every source's alignment check, and the rejected rows."""
    return len(result["shards"]) + len(plan.pair_files) + 1


def load_result(folder: Path) -> dict[str, Any]:
    """What `resolve` decided."""
    result: dict[str, Any] = json.loads((folder / "resolve" / RESULT).read_text(encoding="utf-8"))
    return result


def written_file(folder: Path, number: int) -> Path:
    """What task `number` has to say."""
    return folder / WRITTEN / f"{number:06d}.json"


def assemble(folder: Path, number: int) -> None:
    """Run task `number`: a shard, the alignment check of a source, or the rejected rows."""
    plan, result = Plan.load(folder), load_result(folder)
    shards = result["shards"]
    written: dict[str, Any] = {}
    if number < len(shards):
        written = _write_shard(plan, result, shards[number])
    elif number < len(shards) + len(plan.pair_files):
        written = _check_source(plan, result["samples"][number - len(shards)])
    else:
        _write_rejected(plan)
    path = written_file(folder, number)
    path.parent.mkdir(exist_ok=True)
    write_json(path, written)


def _write_shard(plan: Plan, result: dict[str, Any], shard: dict[str, int]) -> dict[str, Any]:
    name = plan.split_names[shard["split"]]
    ends = np.cumsum(np.asarray(result["records_of_parts"])[:, shard["split"]])
    writer = ShardWriter(
        plan.folder / CORPUS,
        name,
        compression=plan.recipe.compression,
        shard_bytes=2**62,  # where shards end is decided
        first_shard=shard["number"],
        first_block=shard["first"] // BLOCK_SIZE,
    )
    with writer:
        for part in range(
            int(np.searchsorted(ends, shard["first"], side="right")),
            int(np.searchsorted(ends, shard["stop"], side="left")) + 1,
        ):
            before = int(ends[part - 1]) if part else 0
            lines = _lines_of(plan, part, shard["split"])
            for line in islice(lines, max(0, shard["first"] - before), shard["stop"] - before):
                writer.write_encoded(line)
    index = writer.index()
    sync(plan.folder / CORPUS / index.shards[0].path)
    return index.to_json()


def _lines_of(plan: Plan, part: int, split: int) -> Iterator[bytes]:
    decisions = np.load(plan.folder / "resolve" / DECISIONS / f"{part:06d}.npy")
    with (plan.part_folder(part) / RECORDS).open("rb") as file:
        for outcome, line in zip((decisions == split).tolist(), file, strict=True):
            if outcome:
                yield line


def _check_source(plan: Plan, sample: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The alignment check of a source, on records [part, row, line]."""
    pairs: list[Record] = []
    wanted: dict[int, list[int]] = {}
    for part, row, _ in sample:
        wanted.setdefault(part, []).append(row)
    for part, rows in wanted.items():
        inside = set(rows)
        with (plan.part_folder(part) / RECORDS).open("rb") as file:
            pairs += [json.loads(line) for number, line in enumerate(file) if number in inside]
    result = check_alignment([pair["smiles"] for pair in pairs], [pair["text"] for pair in pairs])
    segments = np.array_split(np.asarray([line for _, _, line in sample]), max(1, len(result.segment_aucs)))
    return asdict(result) | {
        "suspect_lines": [
            [int(segments[number][0]), int(segments[number][-1])] for number in result.suspect_segments
        ]
    }


def _write_rejected(plan: Plan) -> None:
    """Rows that made no record and records that are left out, in the order of the input."""
    path = plan.folder / CORPUS / REJECTED_NAME
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        for number, planned in enumerate(plan.parts()):
            one = plan.inputs[planned.file]
            if one.split is None:
                continue
            text = (plan.part_folder(number) / REJECTED).read_text(encoding="utf-8")
            lines = [(json.loads(line)["line"], line) for line in text.split("\n")[:-1]]
            lines += [(row.line, rejection_line(one.name, row)[:-1]) for row in _left_out(plan, number)]
            out.writelines(line + "\n" for _, line in sorted(lines, key=lambda one: one[0]))
    sync(path)


def _left_out(plan: Plan, part: int) -> Iterator[Rejected]:
    from pyarrow import parquet

    decisions = np.load(plan.folder / "resolve" / DECISIONS / f"{part:06d}.npy")
    dropped = np.flatnonzero(decisions < 0)
    if not len(dropped):
        return
    lines = parquet.read_table(plan.part_folder(part) / KEYS, columns=["line"])["line"].to_numpy()
    wanted = dict(zip(dropped.tolist(), lines[dropped].tolist(), strict=True))
    with (plan.part_folder(part) / RECORDS).open("rb") as file:
        for number, encoded in enumerate(file):
            if number in wanted:
                record = json.loads(encoded)
                hazard, reason = describe_outcome(int(decisions[number]), plan)
                excerpt = f"{record['id']}\t{record['smiles']}"[:EXCERPT_LENGTH]
                yield Rejected(wanted[number], hazard, reason, excerpt)
