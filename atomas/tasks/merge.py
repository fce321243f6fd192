"""Reports over seeds from files to a table on screen and one JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from atomas.data.report import make_console
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.metrics.merging import merge_reports, merged_rows


def merge_report_files(files: Sequence[Path], out: Path | None) -> None:
    """Merge the reports in `files`, print mean and deviation, and write them to `out`.

    Raises:
        AtomasError: a file is no report or given twice, or the reports do not go together.
    """
    for number, file in enumerate(files):
        if file.resolve() in [other.resolve() for other in files[:number]]:
            raise AtomasError(f"{file} is given twice: one seed would count as two")
    merged = merge_reports({str(file): _read(file) for file in files})
    table = Table(title=f"{merged['task']}: mean over {len(files)} reports")
    table.add_column("metric", no_wrap=True)
    for column in ("mean", "std"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note")
    for name, summary in merged_rows(merged["metrics"]):
        numbers = ["null" if summary[key] is None else f"{summary[key]:.4f}" for key in ("mean", "std")]
        table.add_row(name, *numbers, summary.get("reason", ""))
    console = make_console()
    console.print(table)
    if out is not None:
        write_json(out, merged)
        console.print(f"merged: {out}", markup=False, soft_wrap=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AtomasError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise AtomasError(f"{file} is no JSON: {error}") from error
    if not isinstance(report, dict):
        raise AtomasError(f"{file} is no report of `atomas evaluate`")
    return report
