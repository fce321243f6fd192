"""A retrieval evaluation from a checkpoint to a table on screen and a JSON file."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from atomas.config import Config
from atomas.data.shards import Corpus
from atomas.data.stream import evaluation_batches
from atomas.distributed.process_group import resolve_device
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.tasks.retrieval import DIRECTIONS, RetrievalResult, evaluate_retrieval
from atomas.training.checkpoint import resolve_checkpoint, verify_checkpoint
from atomas.training.model_files import read_model
from atomas.training.telemetry import environment

COUNTING = (
    "right: every candidate with the InChIKey or the text of the query's own row; equal scores: expectation over "
    "random order; strict_recall_at_1: own row only, ties lost"
)


def retrieval_report(
    *,
    checkpoint: Path,
    best: bool,
    data: Path,
    split: str,
    max_pairs: int | None,
    momentum: bool,
    batch_size: int,
    device_name: str,
    report: Path | None,
) -> RetrievalResult:
    """Verify and load a checkpoint, evaluate a split, print the table, and write `report`.

    Raises:
        AtomasError: the checkpoint or corpus is missing or damaged, the split is unknown or too small.
    """
    if report is not None and not report.parent.is_dir():
        raise AtomasError(f"--report {report}: the folder {report.parent} does not exist")
    folder = resolve_checkpoint(checkpoint, best=best)
    manifest = verify_checkpoint(folder)
    device = resolve_device(device_name, 0)
    model, tokenizer, config = read_model(folder, momentum=momentum)
    model.to(device)
    corpus = Corpus.open(data)
    batches = evaluation_batches(
        corpus.split(split), tokenizer, batch_size=batch_size, max_pairs=max_pairs,
        max_text_tokens=config.data.max_text_tokens,
        max_smiles_tokens=config.longest_smiles,
    )  # fmt: skip
    result = evaluate_retrieval(model, batches, device, hierarchical=True, progress=True)
    if result.pairs < 2:
        raise AtomasError(f"split {split!r} of {data} has {result.pairs} pair(s); retrieval needs at least 2")
    _show(result, folder, split)
    if report is not None:
        write_json(
            report,
            {
                "task": "retrieval",
                "command": shlex.join(["atomas", *sys.argv[1:]]),
                "checkpoint": str(checkpoint),
                "step": manifest["step"],
                "weights": "momentum" if momentum else "online",
                "corpus": {"path": str(data), "split": split, "fingerprint": corpus.fingerprint},
                "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
                "seed": config.run.seed,
                "training": training_config(config),
                "counting": COUNTING,
                **result_json(result),
                "environment": environment(device, 1),
            },
        )
        print(f"report: {report}")
    return result


def training_config(config: Config) -> dict[str, Any]:
    """What the checkpoint was trained with, without the paths of the machine that did it."""
    values = dataclasses.asdict(config)
    del values["run"], values["data"]["corpus"]
    return values


def result_json(result: RetrievalResult) -> dict[str, Any]:
    """The numbers of a result for JSON."""
    return {
        "pairs": result.pairs,
        "distinct_molecules": result.distinct_molecules,
        "distinct_texts": result.distinct_texts,
        "metrics": {
            score: {direction: values[direction].as_dict() for direction in DIRECTIONS}
            for score, values in result.metrics.items()
        },
    }


def _show(result: RetrievalResult, checkpoint: Path, split: str) -> None:
    table = Table(
        title=f"{checkpoint.name}: {result.pairs} pairs of {split!r}, {result.distinct_molecules} molecules, "
        f"{result.distinct_texts} texts",
        caption="same molecule or text is right; equal scores are in random order",
    )
    for column in ("score", "direction"):
        table.add_column(column, no_wrap=True)
    for column in ("R@1", "R@5", "R@10", "MRR", "median", "strict R@1", "tied"):
        table.add_column(column, justify="right")
    for score, directions in result.metrics.items():
        for direction in DIRECTIONS:
            m = directions[direction]
            table.add_row(
                score,
                direction.replace("_", " "),
                *(f"{100 * value:.1f}" for value in (m.recall_at_1, m.recall_at_5, m.recall_at_10)),
                f"{m.mrr:.3f}",
                f"{m.median_rank:g}",
                f"{100 * m.strict_recall_at_1:.1f}",
                str(m.tied_queries),
            )
    # a pipe has no width, and a cut table is worse than a wide one
    console = Console()
    console.width = max(console.width, 100)
    console.print(table)
