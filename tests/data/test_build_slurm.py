"""A build whose tasks run in arrays of a real Slurm of two nodes."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from atomas.data.build import BuildOptions, build_corpus
from atomas.data.building.engine import Local, Slurm, StageError
from atomas.data.building.plan import Plan, PlannedPart
from atomas.data.shard_index import file_sha256
from atomas.data.shards import Corpus
from tests.launcher.slurm_cluster import missing_programs, slurm_cluster

pytestmark = pytest.mark.slow

if missing_programs():
    pytest.skip(f"needs Slurm: {', '.join(missing_programs())}", allow_module_level=True)


def write_pairs(path: Path, rows: int) -> str:
    lines = [f"{'C' * (i % 30 + 1)}\ttext number {i} {'x' * 300}\n" for i in range(rows)]
    path.write_text("smiles\ttext\n" + "".join(lines))
    return str(path)


def shas(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): file_sha256(path) for path in out.rglob("*") if path.is_file()}


def _with_an_obstacle(plan: Plan) -> list[PlannedPart]:
    parts = _save_parts(plan)
    (plan.folder / "examine").mkdir(exist_ok=True)
    (plan.folder / "examine/000001.partial").touch()
    return parts


_save_parts = Plan.save_parts


def _note_parts(kept: list[tuple[str, int]], folder: Path, *_: int) -> None:
    kept += [(path.name, path.stat().st_mtime_ns) for path in (folder / "examine").glob("0?????")]
    raise KeyboardInterrupt


def test_slurm_gives_the_bytes_of_one_node_and_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"train": [write_pairs(tmp_path / "pairs.tsv", 1_000)]}
    recipe = {"identity": "smiles", "fractions": {"train": 0.8, "test": 0.2}}
    build_corpus(files, tmp_path / "here", BuildOptions(engine=Local(workers=1), **recipe))
    with slurm_cluster() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        slurm = Slurm(partition="all", workers=2, memory_gb=1, options={"mem-per-cpu": "0"})
        out, work = tmp_path / "there", tmp_path / ".there.build"
        options = BuildOptions(engine=slurm, **recipe)
        # A part that cannot be examined: its folder's name is taken by a file that the node may not remove.
        with monkeypatch.context() as patch:
            patch.setattr("atomas.data.building.plan.Plan.save_parts", _with_an_obstacle)
            with pytest.raises(StageError, match=r"examining: 1 of \d+ Slurm tasks did not finish .*000001"):
                build_corpus(files, out, options)
        assert not out.exists()
        examined = {path.name: path.stat().st_mtime_ns for path in (work / "examine").glob("0?????")}
        assert len(examined) >= 2
        (work / "examine/000001.partial").unlink()
        kept = []
        with monkeypatch.context() as patch:
            patch.setattr("atomas.data.build.resolve", partial(_note_parts, kept))
            with pytest.raises(KeyboardInterrupt):
                build_corpus(files, out, replace(options, engine=Local(workers=1)))
        assert {name: when for name, when in kept if name in examined} == examined
        build_corpus(files, out, options)
        assert not work.exists()
    assert shas(out) == shas(tmp_path / "here")
    assert 700 < Corpus.open(out).split("train").num_records < 900
    assert json.loads((out / "index.json").read_text())["counts"]["accepted"] == 1_000
