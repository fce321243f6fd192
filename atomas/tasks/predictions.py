"""Predictions from a file to a table on screen and a JSON report."""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from atomas.data.report import make_console
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.metrics.resampling import Bootstrap
from atomas.metrics.scores import Scores, print_scores
from atomas.tasks.prediction_file import IrregularLine, Predictions, read_predictions

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
        tokenizer: folder or hub name of the tokenizer of caption BLEU; None: SciBERT where it is found.
        workers: processes.

    Raises:
        AtomasError: the file, the tokenizer or the folder of the report is not there or not usable.
    """
    if report is not None and not report.parent.is_dir():
        raise AtomasError(f"--report {report}: the folder {report.parent} does not exist")
    predictions = read_predictions(file, task)
    references, outputs = predictions.references, predictions.outputs
    scores = score(task, references, outputs, tokenizer=tokenizer, bootstrap=bootstrap, workers=workers)
    console = make_console()
    print_scores(console, scores, f"{file.name}: {scores.rows:,} {task} predictions")
    _print_irregular(console, predictions)
    if report is not None:
        write_json(report, _report_json(file, task, predictions, scores))
        console.print(f"report: {report}", markup=False, soft_wrap=True)
    return scores


def score(
    task: str,
    references: Sequence[str],
    outputs: Sequence[str],
    *,
    tokenizer: str | None,
    bootstrap: Bootstrap,
    workers: int,
) -> Scores:
    """The metrics of `task` ("caption" or "molecule"); `tokenizer` as in `predictions_report`."""
    if task == "molecule":
        from atomas.metrics.molecules import score_molecules

        return score_molecules(references, outputs, bootstrap=bootstrap, workers=workers)
    from atomas.metrics.caption_tokenizer import CaptionTokenizer
    from atomas.metrics.captions import score_captions

    loaded = CaptionTokenizer.find() if tokenizer is None else CaptionTokenizer.load(tokenizer)
    return score_captions(references, outputs, tokenizer=loaded, bootstrap=bootstrap, workers=workers)


def references_sha256(references: Sequence[str]) -> str:
    """Equal for reports that were scored against the same ground truths in the same order."""
    return hashlib.sha256("\0".join(references).encode()).hexdigest()


def _report_json(file: Path, task: str, predictions: Predictions, scores: Scores) -> dict[str, Any]:
    empty = [line for line, output in zip(predictions.lines, predictions.outputs, strict=True) if not output]
    return {
        "task": task,
        "command": shlex.join(["atomas", *sys.argv[1:]]),
        "file": {"path": str(file), "sha256": predictions.sha256},
        "references_sha256": references_sha256(predictions.references),
        "irregular_lines": len(predictions.irregular),
        "left_out_lines": sum(not line.scored for line in predictions.irregular),
        "doubled_backslashes": {
            "references": _doubled(predictions.references),
            "outputs": _doubled(predictions.outputs),
        },
        "first_lines": {
            "empty_outputs": empty[:LISTED_LINES],
            "irregular_lines": [line._asdict() for line in predictions.irregular[:LISTED_LINES]],
        },
        **scores.as_json(),
    }


def _doubled(texts: Sequence[str]) -> int:
    return sum("\\\\" in text for text in texts)


def _print_irregular(console: Console, predictions: Predictions) -> None:
    empty = sum(not output for output in predictions.outputs)
    if empty:
        console.print(f"{empty:,} empty outputs are scored as failed predictions")
    shown: list[IrregularLine] = predictions.irregular[:LISTED_LINES]
    for line in shown:
        console.print(f"line {line.line}: {line.problem}", markup=False, soft_wrap=True)
    if len(predictions.irregular) > len(shown):
        console.print(f"... and {len(predictions.irregular) - len(shown):,} more irregular lines")
