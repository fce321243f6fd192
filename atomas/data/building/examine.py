"""Stages 1 and 2: files into parts; the rows of a part into records, rejections and identities."""

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from atomas.data.building.plan import Input, Plan, PlannedPart, complete_folder
from atomas.data.hazards import HAZARDS
from atomas.data.parallel import chunked
from atomas.data.records import Accepted, Examiner, Keys, Rejected, record_keys, reference_keys
from atomas.data.row_formats import Part
from atomas.data.shard_index import file_sha256
from atomas.data.shards import Corpus
from atomas.data.sources import Columns
from atomas.errors import AtomasError
from atomas.json_files import write_json

RECORDS, REJECTED, KEYS, SUMMARY = "records.jsonl", "rejected.jsonl", "keys.parquet", "summary.json"
HAZARD_BITS = {name: 1 << bit for bit, name in enumerate(HAZARDS)}
COLUMNS = ("line", "bytes", "molecule", "skeleton", "text", "scaffold", "hazards")
BLOCKS_PER_PART = 64
CHUNK_ROWS = 256


def scan(folder: Path, number: int) -> None:
    """Cut input `number` into parts; the size and SHA-256 of a pair file are noted."""
    plan = Plan.load(folder)
    one = plan.inputs[number]
    found: dict[str, Any]
    if one.is_corpus:
        found = {"names": [], "parts": [asdict(part) for part in _corpus_parts(Corpus.open(one.path))]}
    else:
        is_reference = one.split is None
        columns = Columns() if is_reference else plan.recipe.columns
        layout = one.file.layout(columns, part_bytes=plan.part_bytes, need_text=not is_reference)
        found = {"names": layout.names, "parts": [asdict(part) for part in layout.parts]}
        if not is_reference:
            found |= {"bytes": one.file.path.stat().st_size, "sha256": file_sha256(one.file.path)}
    path = plan.scan_file(number)
    path.parent.mkdir(exist_ok=True)
    write_json(path, found)


def examine(folder: Path, number: int) -> None:
    """Read part `number`; leave its records, rejected rows and identities."""
    plan = Plan.load(folder)
    planned = plan.parts()[number]
    one = plan.inputs[planned.file]
    with complete_folder(plan.part_folder(number)) as out:
        if one.split is None:
            _examine_reference(plan, one, planned, out)
        else:
            _examine_pairs(plan, one, planned, out)


def _examine_pairs(plan: Plan, one: Input, planned: PlannedPart, out: Path) -> None:
    examiner = Examiner(
        source=one.name, identity=plan.recipe.identity, with_scaffold=plan.recipe.needs_scaffolds
    )
    table = array("q")
    """Rows of COLUMNS, one after another"""
    rejected: Counter[str] = Counter()
    first_rejection = ""
    rows = 0
    with (out / RECORDS).open("wb") as records, (out / REJECTED).open("w", encoding="utf-8") as refused:
        chunks = chunked(one.file.read(planned.names, planned.part, plan.recipe.columns), CHUNK_ROWS)
        for outcome in chain.from_iterable(map(examiner.examine, chunks)):
            rows += 1
            if isinstance(outcome, Accepted):
                records.write(outcome.encoded)
                bits = _hazard_bits(outcome.hazards)
                table.extend((outcome.line, len(outcome.encoded), *outcome.keys, bits))
            else:
                rejected[outcome.hazard] += 1
                first_rejection = first_rejection or f"line {outcome.line}: {outcome.reason}"
                refused.write(rejection_line(one.name, outcome))
    _write_keys(out / KEYS, COLUMNS, table)
    write_json(
        out / SUMMARY,
        {"rows": rows, "rejected": rejected, "first_rejection": first_rejection},
    )


def _examine_reference(plan: Plan, one: Input, planned: PlannedPart, out: Path) -> None:
    table = array("q")
    for found in _reference_keys(plan, one, planned):
        table.extend(found)
    _write_keys(out / KEYS, Keys._fields, table)


def _reference_keys(plan: Plan, one: Input, planned: PlannedPart) -> Iterator[Keys]:
    if not one.is_corpus:
        for row in one.file.read(planned.names, planned.part, Columns(), need_text=False):
            keys = reference_keys(row, plan.recipe.identity)
            if keys is not None:
                yield keys
        return
    corpus = Corpus.open(one.path)
    built_with = corpus.index["options"].get("identity", "inchikey")
    if built_with != plan.recipe.identity:
        raise AtomasError(
            f"{one.path} was built with --identity {built_with}, this corpus with {plan.recipe.identity}: "
            "their molecules cannot be compared; build one of them again"
        )
    for split, block in _blocks(corpus, planned.part):
        for record in corpus.split(split).read_block(block):
            yield record_keys(record["inchikey"], record["text"])


def _corpus_parts(corpus: Corpus) -> Iterator[Part]:
    """Its blocks, those of all splits counted on."""
    total = sum(len(split.blocks) for split in corpus.splits.values())
    for start in range(0, total, BLOCKS_PER_PART):
        yield Part(start=start, stop=min(start + BLOCKS_PER_PART, total), line=0, rows=0)


def _blocks(corpus: Corpus, part: Part) -> Iterator[tuple[str, int]]:
    first = 0
    for name, split in corpus.splits.items():
        blocks = len(split.blocks)
        for number in range(max(part.start - first, 0), min(part.stop - first, blocks)):
            yield name, number
        first += blocks


def rejection_line(file: str, row: Rejected) -> str:
    """One line of rejected.jsonl."""
    line = {
        "file": file,
        "line": row.line,
        "hazard": row.hazard,
        "reason": row.reason,
        "row": row.excerpt,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


@lru_cache(4096)
def _hazard_bits(hazards: tuple[str, ...]) -> int:
    return sum(HAZARD_BITS[name] for name in hazards)


def _write_keys(path: Path, names: Sequence[str], table: "array[int]") -> None:
    """`table` holds one row of `names` after another."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = np.asarray(table, dtype=np.int64).reshape(-1, len(names)).T
    buffer = pa.BufferOutputStream()
    parquet.write_table(
        pa.table(dict(zip(names, columns, strict=True))), buffer, compression="NONE", use_dictionary=False
    )
    path.write_bytes(buffer.getvalue())  # so that a full disk is an OSError like any other
