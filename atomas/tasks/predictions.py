"""Predictions from a file to a table on screen and a JSON report."""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from atomas.data.report import make_console
from atomas.json_files import write_json
from atomas.metrics.resampling import Bootstrap
from atomas.metrics.scores import Scores, print_scores
from atomas.tasks.prediction_file import PredictionFile, read_predictions

LISTED_LINES = 20
"""Line numbers of each kind that a report lists; the counts are of all."""


def predictions_report(
    file: Path,
    *,
    task: str,
    tokenizer: str | None,
    bootstrap: Bootstrap,
    workers: int,
    report: Path | None,
) -> Scores:
    """Score a file of predictions, print the table, and write `report`.

    Args:
        file: as described in `prediction_file`.
        task: "caption" or "molecule".
        tokenizer, bootstrap, workers: as in `score`.

    Raises:
        AtomasError: the file or the tokenizer is not there or not usable.
    """
    read = read_predictions(file, task)
    references, outputs = [row.reference for row in read.rows], [row.output for row in read.rows]
    scores = score(task, references, outputs, tokenizer=tokenizer, bootstrap=bootstrap, workers=workers)
    console = make_console()
    print_scores(console, scores, f"{file.name}: {scores.rows:,} {task} predictions")
    _print_irregular(console, read)
    if report is not None:
        write_json(report, _report_json(file, task, read, scores))
        console.print(f"report: {report}", markup=False, soft_wrap=True)
    return scores


def score(
    task: str,
    references: Sequence[str],
    outputs: Sequence[str],
    *,
    tokenizer: str | None = None,
    bootstrap: Bootstrap | None = None,
    workers: int = 1,
) -> Scores:
    """The metrics of `task` ("caption" or "molecule") of outputs, "" where one is missing.

    Args:
        tokenizer: folder or hub name of the tokenizer of caption BLEU; None: SciBERT where it is found.
        bootstrap: how intervals are found (default: 1,000 resamples, 95 %, seed 0).
        workers: processes to fork; leave it at 1 in a process that uses CUDA.
    """
    if task == "molecule":
        from atomas.metrics.molecules import score_molecules

        return score_molecules(references, outputs, bootstrap=bootstrap, workers=workers)
    from atomas.metrics.caption_tokenizer import CaptionTokenizer
    from atomas.metrics.captions import score_captions

    loaded = CaptionTokenizer.find() if tokenizer is None else CaptionTokenizer.load(tokenizer)
    return score_captions(references, outputs, tokenizer=loaded, bootstrap=bootstrap, workers=workers)


def references_sha256(references: Sequence[str]) -> str:
    """Equal for reports on the same ground truths in the same order; only these are merged."""
    return hashlib.sha256("\0".join(references).encode()).hexdigest()


def _report_json(file: Path, task: str, read: PredictionFile, scores: Scores) -> dict[str, Any]:
    empty = [line for line, row in zip(read.lines, read.rows, strict=True) if not row.output]
    return {
        "task": task,
        "command": shlex.join(["atomas", *sys.argv[1:]]),
        "file": {"path": str(file), "sha256": read.sha256},
        "references_sha256": references_sha256([row.reference for row in read.rows]),
        "irregular_lines": len(read.irregular),
        "left_out_lines": sum(not line.scored for line in read.irregular),
        "first_lines": {
            "empty_outputs": empty[:LISTED_LINES],
            "irregular_lines": [line._asdict() for line in read.irregular[:LISTED_LINES]],
        },
        "doubled_backslashes": {
            "references": sum("\\\\" in row.reference for row in read.rows),
            "outputs": sum("\\\\" in row.output for row in read.rows),
        },
        **scores.as_json(),
    }


def _print_irregular(console: Console, read: PredictionFile) -> None:
    empty = sum(not row.output for row in read.rows)
    if empty:
        console.print(f"{empty:,} empty outputs are scored as failed predictions")
    shown = read.irregular[:LISTED_LINES]
    for line in shown:
        console.print(f"line {line.line}: {line.problem}", markup=False, soft_wrap=True)
    if len(read.irregular) > len(shown):
        console.print(f"... and {len(read.irregular) - len(shown):,} more irregular lines")
