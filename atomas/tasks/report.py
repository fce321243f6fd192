"""A retrieval evaluation from a checkpoint to a table on screen and a JSON file."""

import dataclasses
import shlex
import sys
import tempfile
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
from atomas.metrics.resampling import Bootstrap
from atomas.model.atomas import AtomasModel
from atomas.tasks.ranking import RankingMetrics
from atomas.tasks.retrieval import (
    DIRECTIONS,
    EXHAUSTIVE_PAIRS,
    Reranking,
    RetrievalResult,
    evaluate_all_scores,
)
from atomas.training.checkpoint import resolve_checkpoint, verify_checkpoint
from atomas.training.model_files import read_model
from atomas.training.telemetry import environment

COUNTING = (
    "right: every candidate with the InChIKey or the text of the query's own row; equal scores: expectation over "
    "random order; strict_recall_at_1: own row only, ties lost"
)


RERANKED_CANDIDATES = 100


def retrieval_report(
    *,
    checkpoint: Path,
    best: bool,
    data: Path | str,
    split: str,
    max_pairs: int | None,
    momentum: bool,
    batch_size: int,
    device_name: str,
    report: Path | None,
    rerank: int | None = None,
) -> RetrievalResult:
    """Verify and load a checkpoint, evaluate a split, print the table, and write `report`.

    `rerank` is how many candidates of each query the hierarchy orders; None: all pairs have all scores, unless
    there are too many for that.

    Raises:
        AtomasError: the checkpoint or corpus is missing or damaged, the split is unknown or too small.
    """
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
    pairs = min(max_pairs or corpus.split(split).num_records, corpus.split(split).num_records)
    reranking = _reranking(rerank, pairs, model, report)
    result = evaluate_all_scores(model, batches, device, reranking=reranking, bootstrap=Bootstrap())
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
                "bootstrap": {"method": "percentile", **dataclasses.asdict(Bootstrap())},
                "reranked_candidates": None if reranking is None else reranking.depth,
                **result_json(result),
                "environment": environment(device, 1),
            },
        )
        print(f"report: {report}")
    return result


def _reranking(depth: int | None, pairs: int, model: AtomasModel, report: Path | None) -> Reranking | None:
    if model.alignment is None and depth is not None:
        raise AtomasError(f"--rerank {depth}: the model has no hierarchy (loss.hierarchical_weight = 0)")
    if model.alignment is None or (depth is None and pairs <= EXHAUSTIVE_PAIRS):
        return None
    if not model.loss.global_weight:
        raise AtomasError(
            f"{pairs} pairs are too many to score each with each, and without a global loss there is no score that "
            f"chooses candidates: use --max-pairs {EXHAUSTIVE_PAIRS}"
        )
    folder = Path(tempfile.gettempdir()) if report is None else report.parent
    return Reranking(depth=depth or RERANKED_CANDIDATES, folder=folder)


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
        "intervals": {
            score: {direction: dict(values[direction].intervals) for direction in DIRECTIONS}
            for score, values in result.metrics.items()
        },
    }


def _percent(metrics: RankingMetrics, name: str) -> str:
    low, high = metrics.intervals[name]
    return f"{100 * getattr(metrics, name):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _show(result: RetrievalResult, checkpoint: Path, split: str) -> None:
    table = Table(
        title=f"{checkpoint.name}: {result.pairs} pairs of {split!r}, {result.distinct_molecules} molecules, "
        f"{result.distinct_texts} texts",
        caption="same molecule or text is right; equal scores are in random order; "
        "in brackets the 95 % interval over resampled queries",
    )
    for column in ("score", "direction"):
        table.add_column(column, no_wrap=True)
    for column in ("R@1", "R@5", "R@10", "MRR", "median", "strict R@1", "tied"):
        table.add_column(column, justify="right", no_wrap=True)
    for score, directions in result.metrics.items():
        for direction in DIRECTIONS:
            m = directions[direction]
            table.add_row(
                score,
                direction.replace("_", " "),
                _percent(m, "recall_at_1"),
                *(f"{100 * value:.1f}" for value in (m.recall_at_5, m.recall_at_10)),
                f"{m.mrr:.3f}",
                f"{m.median_rank:g}",
                f"{100 * m.strict_recall_at_1:.1f}",
                str(m.tied_queries),
            )
    # a pipe has no width, and a cut table is worse than a wide one
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
