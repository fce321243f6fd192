"""`atomas data build` on real files and on small ones made for one hazard each."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atomas.data import build as building
from atomas.data.build import BuildOptions, build_corpus
from atomas.data.building.engine import Engine, Local, Slurm, Task, run_stage
from atomas.data.building.plan import Criterion
from atomas.data.hazards import HAZARDS
from atomas.data.shard_index import file_sha256
from atomas.data.shards import Corpus
from atomas.data.sources import Columns
from atomas.errors import AtomasError

ONE = BuildOptions(engine=Local(workers=1))
NAMES = (
    "methane",
    "ethane",
    "propane",
    "butane",
    "pentane",
    "hexane",
    "heptane",
    "octane",
    "nonane",
    "decane",
)


def write_tsv(path: Path, rows: Sequence[tuple[str, str]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{a}\t{b}\n" for a, b in [("SMILES", "description"), *rows]), encoding="utf-8")
    return str(path)


def alkanes(path: Path, start: int = 0, stop: int = 10) -> str:
    return write_tsv(path, [("C" * (i + 1), f"It is {NAMES[i]}.") for i in range(start, stop)])


def build(source: str | Path, out: Path, options: BuildOptions = ONE) -> dict[str, Any]:
    return build_corpus({"train": [str(source)]}, out, options)


def read_rejected(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]


def counted(hazards: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in hazards.items() if count}


@pytest.fixture(scope="session")
def chebi(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "chebi"
    build(shared_data / "chebi20/validation.txt", out)
    return out


def test_chebi_validation(chebi: Path) -> None:
    corpus = Corpus.open(chebi)
    assert counted(corpus.index["hazards"]) == {
        "doubled_backslash": 502,
        "duplicate_molecule": 14,
        "duplicate_text": 2,
        "not_canonical": 3070,
        "multi_component": 160,
        "single_atom": 8,
        "long_smiles": 25,
        "smiles_outside_t5": 502,
        "text_outside_t5": 61,
        "odd_quotes": 3,
        "non_ascii_text": 4,
    }
    assert list(corpus.index["hazards"]) == list(HAZARDS)
    assert corpus.index["alignment"]["validation.txt"]["verdict"] == "aligned"
    counts = corpus.index["counts"]
    assert (counts["rows"], counts["accepted"], counts["rejected"]) == (3301, 3301, 0)
    records = list(corpus.split("train"))
    assert records[0] == {
        "id": "92470518",
        "smiles": "CC(=CCC1=CC2=C(C=C1OC)OC[C@@]3([C@H]2OC4=C3C=CC(=C4)O)O)C",
        "canonical_smiles": "COc1cc2c(cc1CC=C(C)C)[C@@H]1Oc3cc(O)ccc3[C@]1(O)CO2",
        "inchikey": "WOKIXZBYDPTMJD-LEWJYISDSA-N",
        "text": records[0]["text"],
        "source": "validation.txt",
    }
    assert not any("\\\\" in record["smiles"] for record in records)
    assert sum("\\" in record["smiles"] for record in records) == 502


def test_pcdes_validation_and_leakage(shared_data: Path, chebi: Path, tmp_path: Path) -> None:
    options = replace(ONE, exclude=(str(chebi),))
    index = build(shared_data / "pcdes/validation.txt", tmp_path / "pcdes", options)
    assert (
        index["hazards"]["mojibake"]
        + sum(row["hazard"] == "leakage" for row in read_rejected(tmp_path / "pcdes"))
        >= 50
    )
    left_out = index["hazards"]["leakage"]
    assert left_out == index["counts"]["excluded"] == 1500 - index["counts"]["accepted"] > 20
    inside = {record["inchikey"] for record in Corpus.open(chebi).split("train")}
    kept = [record["inchikey"] for record in Corpus.open(tmp_path / "pcdes").split("train")]
    assert not inside.intersection(kept)
    skeletons = {key.split("-")[0] for key in inside}
    assert index["hazards"]["skeleton_leakage"] == sum(key.split("-")[0] in skeletons for key in kept) > 0
    assert index["alignment"]["validation.txt"]["verdict"] == "aligned"


def test_pubchem_validation(shared_data: Path, tmp_path: Path) -> None:
    index = build(shared_data / "pubchem324k/validation.txt", tmp_path / "pubchem")
    assert counted(index["hazards"]) == {
        "duplicate_text": 17,
        "not_canonical": 913,
        "multi_component": 87,
        "no_heavy_atom": 1,
        "single_atom": 5,
        "short_smiles": 1,
        "long_smiles": 4,
        "long_text": 15,
        "smiles_outside_t5": 130,
        "text_outside_t5": 8,
        "non_ascii_text": 16,
        "markup": 2,
    }
    assert index["alignment"]["validation.txt"]["verdict"] == "aligned"


@pytest.mark.slow
def test_iupac_train_holds_chebi_molecules(shared_data: Path, chebi: Path, tmp_path: Path) -> None:
    options = BuildOptions(exclude=(str(chebi),))
    index = build(shared_data / "iupac/train.txt", tmp_path / "iupac", options)
    assert index["hazards"]["leakage"] > 100
    assert index["alignment"]["train.txt"]["verdict"] == "aligned"


def test_misaligned_corpus_is_reported(shared_data: Path, tmp_path: Path) -> None:
    with (shared_data / "pcdes/misaligned.txt").open(encoding="utf-8") as file:
        (tmp_path / "bad.txt").write_text("".join(next(file) for _ in range(601)), encoding="utf-8")
    index = build(tmp_path / "bad.txt", tmp_path / "out")
    assert index["alignment"]["bad.txt"]["verdict"] == "misaligned"


def test_lost_line_is_located(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "chebi20/validation.txt").read_text(encoding="utf-8").splitlines()[1:802]
    rows = [line.split("\t") for line in lines]
    texts = [row[2] for row in rows]
    del texts[400]
    source = write_tsv(tmp_path / "shifted.tsv", [(a[1], b) for a, b in zip(rows, texts, strict=False)])
    result = build(source, tmp_path / "out")["alignment"]["shifted.tsv"]
    assert result["verdict"] == "partly misaligned"
    first, last = result["suspect_lines"][0][0], result["suspect_lines"][-1][1]
    assert 390 < first < 420
    assert last > 790


def test_set_texts_of_a_headerless_zip(shared_data: Path, tmp_path: Path) -> None:
    import zipfile

    with (
        zipfile.ZipFile(shared_data / "lpm24/additional_data.zip") as archive,
        archive.open("train_props.txt") as member,
        zipfile.ZipFile(tmp_path / "part.zip", "w") as part,
    ):
        part.writestr("props.txt", b"".join(next(member) for _ in range(700)))
    options = replace(ONE, columns=Columns(header=("smiles", "text")))
    index = build(tmp_path / "part.zip", tmp_path / "out", options)
    assert index["hazards"]["phrase_set"] == 700
    assert index["hazards"]["duplicate_text"] > 100
    assert index["alignment"]["part.zip:props.txt"]["verdict"] == "aligned"
    first = next(iter(Corpus.open(tmp_path / "out").split("train")))
    assert first["text"].startswith("Diabetic heart disease; Stabilizing cytochrome oxidase; Aging; ")


def test_rejected_rows_have_file_line_and_reason(tmp_path: Path) -> None:
    source = tmp_path / "pairs.tsv"
    source.write_text(
        "id\tsmiles\ttext\n1\tCCO\tethanol\n2\tO=Cl(=O)(=O)F\tperchloryl fluoride\n3\t\tnothing\n"
        "4\tCC\t  \n5\tCC\n6\t*\tanything\n"
    )
    index = build(source, tmp_path / "out")
    rejected = read_rejected(tmp_path / "out")
    assert [(row["file"], row["line"], row["hazard"], row["reason"]) for row in rejected] == [
        (
            "pairs.tsv",
            3,
            "invalid_molecule",
            "Explicit valence for atom # 1 Cl, 7, is greater than permitted",
        ),
        ("pairs.tsv", 4, "missing_value", "no SMILES"),
        ("pairs.tsv", 5, "missing_value", "no text"),
        ("pairs.tsv", 6, "malformed_row", "2 fields where the header names 3"),
    ]
    assert rejected[0]["row"] == "2\tO=Cl(=O)(=O)F\tperchloryl fluoride"
    assert index["counts"]["rejected"] == 4
    assert [record["id"] for record in Corpus.open(tmp_path / "out").split("train")] == ["1", "6"]
    assert index["hazards"]["wildcard_atom"] == index["hazards"]["no_inchikey"] == 1


def test_bytes_do_not_depend_on_workers(shared_data: Path, tmp_path: Path) -> None:
    files = {"train": [str(shared_data / "iupac/validation.txt")]}
    fractions = {"train": 0.8, "validation": 0.1, "test": 0.1}
    found = []
    for workers in (1, 3):
        out = tmp_path / f"{workers}" / "out"
        build_corpus(
            files, out, BuildOptions(engine=Local(workers=workers), fractions=fractions, by="scaffold")
        )
        found.append(shas(out))
    assert found[0] == found[1]
    assert len(found[0]) == 5


def test_named_splits_sources_and_overlap(tmp_path: Path) -> None:
    files = {
        "train": [alkanes(tmp_path / "a/pairs.tsv", 0, 6), alkanes(tmp_path / "b/pairs.tsv", 6, 8)],
        "validation": [alkanes(tmp_path / "c/pairs.tsv", 5, 10)],
    }
    index = build_corpus(files, tmp_path / "out", ONE)
    corpus = Corpus.open(tmp_path / "out")
    assert list(corpus.splits) == ["train", "validation"]
    assert [record["source"] for record in corpus.split("train")] == ["a/pairs.tsv"] * 6 + ["b/pairs.tsv"] * 2
    assert index["counts"]["overlap"] == [{"splits": ["train", "validation"], "molecules": 3, "texts": 3}]
    assert [source["split"] for source in index["sources"]] == ["train", "train", "validation"]


def test_random_fractions_keep_a_molecule_together(tmp_path: Path) -> None:
    rows = [("C" * (i // 3 + 1), f"text {i}") for i in range(300)]
    options = replace(ONE, fractions={"train": 0.8, "test": 0.2})
    index = build(write_tsv(tmp_path / "pairs.tsv", rows), tmp_path / "out", options)
    assert index["counts"]["overlap"][0]["molecules"] == 0
    assert index["splits"]["test"]["num_records"] == 60
    order = [int(record["text"].split()[1]) for record in Corpus.open(tmp_path / "out").split("train")]
    assert order == sorted(order)
    other = build(tmp_path / "pairs.tsv", tmp_path / "other", replace(options, seed=1))
    assert other["fingerprint"] != index["fingerprint"]


def test_exclude_by_skeleton_leaves_out_stereoisomers(tmp_path: Path) -> None:
    source = write_tsv(
        tmp_path / "pairs.tsv", [("C[C@H](N)C(=O)O", "L"), ("C[C@@H](N)C(=O)O", "D"), ("O", "w")]
    )
    other = tmp_path / "other.csv"
    other.write_text("smiles\nC[C@H](N)C(=O)O\nnonsense\n")
    index = build(source, tmp_path / "one", replace(ONE, exclude=(str(other),)))
    assert (index["hazards"]["leakage"], index["hazards"]["skeleton_leakage"]) == (1, 1)
    index = build(source, tmp_path / "two", replace(ONE, exclude=(str(other),), exclude_by="skeleton"))
    assert (index["hazards"]["leakage"], index["hazards"]["skeleton_leakage"]) == (2, 0)
    with pytest.raises(AtomasError, match=r"would be empty \(3 rows; line 2: its molecule is in pairs.tsv"):
        build(source, tmp_path / "none", replace(ONE, exclude=(source,)))


def test_duplicates_are_counted_within_splits(tmp_path: Path) -> None:
    rows = [("CCO", "a"), ("OCC", "a"), ("CCO", "b"), ("CC", "b"), ("C", "c")]
    index = build(write_tsv(tmp_path / "pairs.tsv", rows), tmp_path / "out")
    found = {name: index["hazards"][f"duplicate_{name}"] for name in ("molecule", "text", "pair")}
    assert found == {"molecule": 3, "text": 4, "pair": 2}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], ONE, "the corpus would be empty .0 rows; no row after the header"),
        ([("C1", "broken")], ONE, r"would be empty .1 rows; line 2: SMILES Parse Error: unclosed ring"),
        (
            [("C", "methane")],
            replace(ONE, fractions={"train": 0.9, "test": 0.1}),
            "split 'test' would be empty",
        ),
        ([("C", "methane")], replace(ONE, fractions={"train": 0.9, "test": 0.2}), "sum to 1, not 1.1"),
        ([("C", "methane")], replace(ONE, engine=Local(workers=0)), "at least 1"),
        ([("C", "methane")], replace(ONE, exclude=("nowhere",)), "there is no file nowhere"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, rows: list[tuple[str, str]], options: BuildOptions, message: str
) -> None:
    source = write_tsv(tmp_path / "pairs.tsv", rows)
    with pytest.raises(AtomasError, match=message) as caught:
        build(source, tmp_path / "out", options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.tsv"]


def test_a_slurm_job_gets_the_memory_that_duplicates_are_found_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, int] = {}

    def run_here(engine: Engine, folder: Path, tasks: int, task: Task, *, label: str, unit: str) -> None:
        assert isinstance(engine, Slurm)
        asked[folder.name] = engine.memory_gb
        run_stage(Local(workers=1), folder, tasks, task, label=label, unit=unit)

    monkeypatch.setattr(building, "run_stage", run_here)
    options = BuildOptions(engine=Slurm(partition="cpu"), memory_mb=32 * 1024)
    build(alkanes(tmp_path / "pairs.tsv"), tmp_path / "out", options)
    assert asked == {"scan": 4, "examine": 4, "resolve": 34, "write": 4}


def test_same_file_twice(tmp_path: Path) -> None:
    source = alkanes(tmp_path / "pairs.tsv")
    with pytest.raises(AtomasError, match="is given twice"):
        build_corpus({"train": [source], "test": [source]}, tmp_path / "out", ONE)


def test_rebuilding_replaces_a_build_and_spares_everything_else(tmp_path: Path) -> None:
    source, out = alkanes(tmp_path / "pairs.tsv"), tmp_path / "out"
    build(source, out)
    first = Corpus.open(out).fingerprint
    build(alkanes(tmp_path / "fewer.tsv", 0, 5), out)
    assert Corpus.open(out).fingerprint != first
    (out / "notes.txt").write_text("mine")
    with pytest.raises(AtomasError, match="holds files that no build wrote"):
        build(source, out)
    assert (out / "notes.txt").read_text() == "mine"
    build(source, out, replace(ONE, overwrite=True))
    assert not (out / "notes.txt").exists()
    assert Corpus.open(out).fingerprint == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fewer.tsv", "out", "pairs.tsv"]


def test_inputs_and_current_folder_are_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = alkanes(tmp_path / "folder/pairs.tsv")
    with pytest.raises(AtomasError, match="lies inside --out"):
        build(source, tmp_path / "folder", replace(ONE, overwrite=True))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(AtomasError, match="the folder you are in"):
        build(source, Path("."), replace(ONE, overwrite=True))
    assert Path(source).exists()


def test_unwritable_output_is_one_line(tmp_path: Path) -> None:
    source = alkanes(tmp_path / "pairs.tsv")
    with pytest.raises(AtomasError, match=r"cannot write .*choose another --out"):
        build(source, Path(source) / "out")


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source, out = alkanes(tmp_path / "pairs.tsv"), tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(AtomasError, match=r"cannot write .*: File too large"):
            build(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.tsv"]


def start_build(source: str, out: Path, *options: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "atomas", "data", "build", source, "--out", str(out), *options]
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finished_parts(work: Path) -> set[str]:
    return {path.name for path in (work / "examine").glob("[0-9]*") if path.name.isdigit()}


def kill_when(process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def shas(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): file_sha256(p) for p in out.rglob("*") if p.is_file()}


def test_killed_build_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [("C" * (i % 60 + 1), f"text number {i}") for i in range(20_000)]
    source = write_tsv(tmp_path / "pairs.tsv", rows)
    out, work = tmp_path / "out", tmp_path / ".out.build"
    options = ("--workers", "2", "--identity", "smiles", "--fractions", "train=0.9,test=0.1")
    kill_when(start_build(source, out, *options), lambda: len(finished_parts(work)) >= 2)
    done = {name: (work / "examine" / name).stat().st_mtime_ns for name in finished_parts(work)}
    assert len(done) >= 2
    assert not out.exists()
    # A part can be complete before it is marked; one process each may be caught between the two.
    marked = {path.name for path in (work / "stages/examine/completions").iterdir()}
    assert len(marked) >= len(done) - 2
    kill_when(start_build(source, out, *options), (work / "resolve/result.json").exists)
    assert not out.exists()
    examined = {name: (work / "examine" / name).stat().st_mtime_ns for name in finished_parts(work)}
    assert len(examined) > len(done)
    redone = [name for name, when in done.items() if examined[name] != when]
    assert len(redone) <= len(done) - len(marked)
    assert start_build(source, out, *options).wait(timeout=300) == 0
    assert not work.exists()
    fresh = BuildOptions(engine=Local(workers=1), identity="smiles", fractions={"train": 0.9, "test": 0.1})
    build(source, tmp_path / "fresh", fresh)
    assert shas(out) == shas(tmp_path / "fresh")
    assert Corpus.open(out).split("train").num_records == 18_000


def test_killed_build_with_other_input_starts_anew(tmp_path: Path) -> None:
    source, out, work = alkanes(tmp_path / "pairs.tsv"), tmp_path / "out", tmp_path / ".out.build"
    kill_when(start_build(source, out, "--workers", "1"), (work / "stages/scan").exists)
    assert not out.exists()
    build(alkanes(tmp_path / "fewer.tsv", 0, 5), out)
    assert Corpus.open(out).split("train").num_records == 5
    assert not work.exists()


def test_worker_that_is_killed_is_an_error_and_its_build_can_go_on(tmp_path: Path) -> None:
    rows = [("C" * (i % 60 + 1), f"text number {i}") for i in range(20_000)]
    source, out, work = write_tsv(tmp_path / "pairs.tsv", rows), tmp_path / "out", tmp_path / ".out.build"
    command = [
        sys.executable,
        "-m",
        "atomas",
        "data",
        "build",
        source,
        "--out",
        str(out),
        "--identity",
        "smiles",
    ]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    while not finished_parts(work) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2
    assert error.splitlines()[-1].startswith("atomas: error: a process died while examining (out of memory?)")
    assert finished_parts(work)
    assert not out.exists()


def test_second_build_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    source, work = alkanes(tmp_path / "pairs.tsv"), tmp_path / ".out.build"
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(AtomasError, match="another build of out is running"):
            build(source, tmp_path / "out")
    build(source, tmp_path / "out")


def test_full_disk_keeps_what_is_done(tmp_path: Path) -> None:
    rows = [("C" * (i % 30 + 1), "x" * 400 + str(i)) for i in range(2_000)]
    source, out = write_tsv(tmp_path / "pairs.tsv", rows), tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, hard))  # parts fit, the shard does not
    try:
        with pytest.raises(
            AtomasError, match=r"File too large; make room .*run the same command again"
        ) as caught:
            build(source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    parts = finished_parts(tmp_path / ".out.build")
    assert len(parts) >= 2
    before = {name: (tmp_path / ".out.build/examine" / name).stat().st_mtime_ns for name in parts}
    assert before
    build(source, out)
    assert Corpus.open(out).split("train").num_records == 2_000


def test_deduplicated_by_molecule_text_and_pair(tmp_path: Path) -> None:
    rows = [("CCO", "a"), ("OCC", "a"), ("CCO", "b"), ("CC", "b"), ("C", "c")]
    source = write_tsv(tmp_path / "pairs.tsv", rows)
    wanted: dict[tuple[Criterion, ...], list[int]] = {
        ("pair",): [2, 4, 5, 6],
        ("molecule",): [2, 5, 6],
        ("text",): [2, 4, 6],
        ("molecule", "text"): [2, 5, 6],
        ("text", "molecule"): [2, 6],
    }
    for criteria, kept in wanted.items():
        index = build(source, tmp_path / "out", replace(ONE, deduplicate=criteria))
        assert [int(record["id"]) for record in Corpus.open(tmp_path / "out").split("train")] == kept
        assert index["hazards"]["deduplicated"] == index["counts"]["deduplicated"] == 5 - len(kept)
        dropped = [row for row in read_rejected(tmp_path / "out") if row["hazard"] == "deduplicated"]
        assert sorted([row["line"] for row in dropped] + kept) == [2, 3, 4, 5, 6]


def test_deduplicated_across_files_of_a_split(tmp_path: Path) -> None:
    files = {
        "train": [alkanes(tmp_path / "a.tsv", 0, 6), alkanes(tmp_path / "b.tsv", 4, 8)],
        "test": [alkanes(tmp_path / "c.tsv", 7, 10)],
    }
    index = build_corpus(files, tmp_path / "out", replace(ONE, deduplicate=("molecule",)))
    assert [source["deduplicated"] for source in index["sources"]] == [0, 2, 0]
    assert index["counts"]["overlap"][0]["molecules"] == 1
    assert [source["records"] for source in index["sources"]] == [{"train": 6}, {"train": 2}, {"test": 3}]


def test_weights_are_recorded(tmp_path: Path) -> None:
    one, other = alkanes(tmp_path / "a.tsv", 0, 6), alkanes(tmp_path / "b.tsv", 4, 8)
    index = build_corpus({"train": [one, other]}, tmp_path / "out", replace(ONE, weights={other: 0.5}))
    assert [source["weight"] for source in index["sources"]] == [1.0, 0.5]
    with pytest.raises(AtomasError, match=r"there is no input c\.tsv"):
        build_corpus({"train": [one, other]}, tmp_path / "out", replace(ONE, weights={"c.tsv": 0.5}))


def test_parts_and_shards_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards: their records go on where the shard before ends, across parts and splits."""
    monkeypatch.setattr("atomas.data.building.resolve.SHARD_BYTES", 100_000)
    monkeypatch.setattr("atomas.data.building.plan.MIN_PART_BYTES", 10_000)
    rows = [("C" * (i % 30 + 1), f"text number {i} " + "x" * (i % 97)) for i in range(4_000)]
    source = write_tsv(tmp_path / "pairs.tsv", rows)
    build(source, tmp_path / "out", replace(ONE, fractions={"train": 0.7, "test": 0.3}, identity="smiles"))
    corpus = Corpus.open(tmp_path / "out")
    found = {name: [int(record["id"]) for record in split] for name, split in corpus.splits.items()}
    assert sorted(found["train"] + found["test"]) == list(range(2, 4_002))
    for name, split in corpus.splits.items():
        assert found[name] == sorted(found[name])
        assert len(split.shards) >= 3
        assert all(shard.num_records % 256 == 0 for shard in split.shards[:-1])
        assert [block.num_records for block in split.blocks][:-1] == [256] * (len(split.blocks) - 1)
