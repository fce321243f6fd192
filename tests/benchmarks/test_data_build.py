"""The build benchmark: rates of the rows that were built, and a table that holds them."""

import json
from pathlib import Path

import pytest

from atomas.cli import main
from atomas.viz.tables import data_build_table


def test_a_report_of_a_small_file(tmp_path: Path) -> None:
    rows = [f"{i}\t{'C' * (i % 20 + 1)}O\ttext number {i}\n" for i in range(80)]
    (tmp_path / "pairs.tsv").write_text("id\tsmiles\ttext\n" + "".join(rows))
    out = tmp_path / "build.json"
    command = ["bench", "data-build", str(tmp_path / "pairs.tsv"), "--rows", "60", "--rounds", "1"]
    main([*command, "--workers", "1", "--json", str(out)])
    report = json.loads(out.read_text())
    kinds = [(row["kind"], row["identity"], row["rows"]) for row in report["rows"]]
    assert kinds == [
        ("examine", "inchikey", 60),
        ("build", "inchikey", 60),
        ("examine", "smiles", 60),
        ("build", "smiles", 60),
    ]
    for row in report["rows"]:
        assert 0 < row["share_of_rdkit"] < 2
        if row["kind"] == "build":
            assert sum(row["stages"].values()) <= row["seconds"]
        else:
            assert 1e6 / sum(row["microseconds"].values()) == pytest.approx(row["examine_rows_per_s"])
    table = data_build_table(report)
    assert table.count("\n") == 2 + 2 + 1 + 2 + 1
    assert f"{report['rows'][0]['rdkit_rows_per_s']:,.0f}" in table
