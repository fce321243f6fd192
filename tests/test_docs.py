"""The documentation's tables are those of the committed results, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from atomas.viz.tables import PAGES, RESULTS, fault_table, render_page, retrieval_table

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_up_to_date(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.search(r"<!-- [a-z0-9_-]+ -->\n(?:(?!<!--).*\n)*?\|", text), "no table in this page"
    assert render_page(text, ROOT / RESULTS) == text, "run `python -m atomas.viz.tables`"


def test_links() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tests_that_are_named_are_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for file, name in re.findall(
            r"`(tests/[\w/]+\.py)(?:::(\w+))?[`\[]", page.read_text(encoding="utf-8")
        ):
            assert (ROOT / file).exists(), f"{page.name}: {file}"
            if name:
                assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (
                    f"{page.name}: {file}::{name}"
                )


def test_a_table_holds_the_numbers_of_its_reports() -> None:
    values = {"recall_at_1": 0.25, "recall_at_10": 0.5, "median_rank": 3.0}
    report = {
        "pairs": 500,
        "step": 7,
        "metrics": {
            "global": {"text_to_molecule": values, "molecule_to_text": {**values, "recall_at_1": 0.125}}
        },
    }
    table = retrieval_table({"mine": report})
    assert "| mine | 7 | global | 25.0 % | 50.0 % | 3 | 12.5 % | 50.0 % |" in table
    assert "500 held-out pairs: chance is 0.2 % R@1." in table


def test_a_fault_that_was_not_survived_is_said() -> None:
    report = {
        "ranks": 2,
        "steps": 6,
        "checkpoint_every": 2,
        "silence_timeout_seconds": 10,
        "host": "h",
        "date": "d",
    }
    good = {
        "result": "passed", "happened": "a | b", "start": "here", "again": "itself", "steps_lost": 1,
        "detect_seconds": 2.4, "resume_seconds": 9.6, "deviation": 0.0,
    }  # fmt: skip
    rows = {
        "one": good,
        "two": {"result": "failed", "why": "x"},
        "three": {"result": "skipped", "why": "no Slurm"},
    }
    table = fault_table({**report, "faults": rows})
    assert "| one | a \\| b | here | itself | 1 | 2 | 10 |" in table
    assert "| two | **did not go on as it should** |" in table
    assert "three (no Slurm)" in table
    assert "any loss from the undisturbed run's: 0." in table
