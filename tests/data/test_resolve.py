"""Duplicates, exclusions and splits of many records in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from atomas.data.building.examine import COLUMNS
from atomas.data.building.plan import Input, Plan, Recipe
from atomas.data.building.resolve import resolve
from atomas.json_files import write_json

ROWS_OF_PART = 100_000
RESOLVE = (
    "import resource, sys, pathlib\nimport duckdb, pyarrow, pyarrow.parquet\n"
    "from atomas.data.building.resolve import resolve\n"
    "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    "resolve(pathlib.Path(sys.argv[1]), int(sys.argv[2]), 0)\n"
    "print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
)


def write_parts(folder: Path, parts: int, *, molecules: int, texts: int) -> list[np.ndarray]:
    """An examined build of one file with identities at random; returns [molecule, text] of all records."""
    (folder / "pairs.tsv").write_text("smiles\ttext\n")
    one = Input(name="pairs.tsv", split="train", path=str(folder / "pairs.tsv"))
    recipe = Recipe(deduplicate=("molecule",), fractions={"train": 0.9, "test": 0.1})
    work = folder / "work"
    work.mkdir()
    plan = Plan(work, [one], recipe)
    plan.save()
    found = []
    planned = []
    for number in range(parts):
        rng = np.random.default_rng(number)
        table = {name: np.zeros(ROWS_OF_PART, dtype=np.int64) for name in COLUMNS}
        table["line"] = np.arange(ROWS_OF_PART) + number * ROWS_OF_PART
        table["bytes"] = np.full(ROWS_OF_PART, 300)
        # Spread over 63 bits as hashes are.
        table["molecule"] = rng.integers(1, molecules, ROWS_OF_PART) * 0x5851F42D4C957F2D % (2**63 - 25)
        table["skeleton"] = table["molecule"] // 7
        table["text"] = rng.integers(1, texts, ROWS_OF_PART) * 0x14057B7EF767814F % (2**63 - 25)
        out = plan.part_folder(number)
        out.mkdir(parents=True)
        parquet.write_table(pa.table(table), out / "keys.parquet")
        write_json(out / "summary.json", {"rows": ROWS_OF_PART, "rejected": {}, "first_rejection": ""})
        planned.append(
            {"file": 0, "names": [], "part": {"start": 0, "stop": 0, "line": 0, "rows": ROWS_OF_PART}}
        )
        found.append(np.stack([table["molecule"], table["text"]]))
    write_json(work / "parts.json", planned)
    return found


def check(folder: Path, found: list[np.ndarray]) -> None:
    """Against the same worked out in memory."""
    molecule, text = np.concatenate(found, axis=1)
    _, first = np.unique(molecule, return_index=True)
    kept = np.zeros(len(molecule), dtype=bool)
    kept[first] = True
    decisions = [np.load(path) for path in sorted((folder / "work/resolve/decisions").iterdir())]
    outcome = np.concatenate(decisions)
    assert np.array_equal(outcome >= 0, kept)
    result = json.loads((folder / "work/resolve/result.json").read_text())
    counts = result["counts"]
    assert counts["deduplicated"] == int((~kept).sum())
    assert counts["accepted"] == int(kept.sum())
    assert abs(counts["splits"]["test"]["records"] - kept.sum() / 10) < 1
    for number, name in enumerate(("train", "test")):
        assert counts["splits"][name]["texts"] == len(np.unique(text[outcome == number]))
    shared = np.intersect1d(text[outcome == 0], text[outcome == 1])
    assert counts["overlap"] == [{"splits": ["train", "test"], "molecules": 0, "texts": len(shared)}]
    stops = [shard["stop"] for shard in result["shards"] if shard["split"] == 0]
    assert stops[-1] == counts["splits"]["train"]["records"]


def test_as_in_memory(tmp_path: Path) -> None:
    found = write_parts(tmp_path, 2, molecules=150_000, texts=50_000)
    resolve(tmp_path / "work", 512, 0)
    check(tmp_path, found)


@pytest.mark.slow
def test_five_million_records_in_bounded_memory(tmp_path: Path) -> None:
    found = write_parts(tmp_path, 50, molecules=4_000_000, texts=3_000_000)
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, str(tmp_path / "work"), "300"],
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak = (int(word) / 1024 for word in done.stdout.split())
    print(f"{before:.0f} MiB before, {peak:.0f} MiB at most, {sum(len(part[0]) for part in found):,} records")
    # Records and their keys are 400 MB; DuckDB was given 300 MB, the rest is Arrow's batches and the allocator.
    assert peak - before < 500
    check(tmp_path, found)
