"""The main job end to end: corpus, training on two ranks, evaluation, pictures."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from atomas.data.demo import build_demo_corpus
from atomas.data.shards import Corpus
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.tasks.decoding import DecodingSettings, Task, Writer
from atomas.tasks.report import result_json, retrieval_report
from atomas.tasks.visualization import corpus_pairs, visualize
from atomas.training.checkpoint import resolve_checkpoint
from atomas.training.model_files import read_model
from atomas.training.telemetry import read_metrics
from atomas.viz.training_curves import plot_training_curves

RUNS = {"hierarchical": [], "global-only": ["--loss.hierarchical_weight", "0"]}
"""The paper's model, and the same run without what is its own."""

SHOWN_ROW = 5
"""Of the test split: a small molecule with a text of a few lines."""


def run_demo(out: Path, config: Path, *, pairs: int, overrides: Sequence[str], seed: int = 0) -> None:
    """Do everything below `out`, skipping what an earlier call has finished.

    Raises:
        AtomasError: a training run failed; its log says why.
    """
    started = time.monotonic()
    console = Console()
    corpus = out / "corpus"
    if (corpus / "index.json").is_file():
        present = sum(part["num_records"] for part in Corpus.open(corpus).index["splits"].values())
        if present != pairs:
            raise AtomasError(f"{corpus} has {present} pairs, --pairs is {pairs}: choose another --out")
    else:
        console.rule(f"a corpus of {pairs:,} generated pairs")
        build_demo_corpus(corpus, pairs=pairs, seed=seed)
    results = {}
    for name, extra in RUNS.items():
        console.rule(f"training: {name}")
        _train(out, name, config, corpus, [*extra, *overrides])
        console.rule(f"held-out pairs: {name}")
        results[name] = retrieval_report(
            checkpoint=out / name,
            best=False,
            data=corpus,
            split="test",
            max_pairs=None,
            momentum=False,
            batch_size=64,
            device_name="auto",
            report=out / name / "retrieval.json",
        )
    picture = out / "losses.png"
    plot_training_curves({name: read_metrics(out / name) for name in RUNS}, picture)
    table = Table(title=f"Text -> molecule on {results['hierarchical'].pairs} held-out pairs")
    for column in ("run", "score"):
        table.add_column(column)
    for column in ("R@1 %", "R@10 %", "median rank"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        for score, directions in result.metrics.items():
            m = directions["text_to_molecule"]
            table.add_row(
                name, score, f"{100 * m.recall_at_1:.1f}", f"{100 * m.recall_at_10:.1f}", f"{m.median_rank:g}"
            )
    table.add_row("chance", "", f"{100 / results['hierarchical'].pairs:.1f}", "", "")
    console.print(table)
    summary = out / "summary.json"
    write_json(summary, {name: result_json(result) for name, result in results.items()})
    if "hierarchical" in results["hierarchical"].metrics:
        console.rule("a held-out pair")
        _show_pair(out, corpus, console)
    minutes = (time.monotonic() - started) / 60
    console.print(f"{minutes:.1f} minutes. Losses: {picture}  numbers: {summary}  runs: {out}")


def _show_pair(out: Path, corpus: Path, console: Console) -> None:
    """The pair, what the model writes for each side of it, and the picture of what it has aligned."""
    last = Corpus.open(corpus).split("test").num_records - 1
    pairs = corpus_pairs(corpus, "test", [min(SHOWN_ROW, last)])
    text, smiles = pairs[0].text, pairs[0].smiles
    model, tokenizer, config = read_model(resolve_checkpoint(out / "hierarchical"))

    def written(task: Task, source: str) -> str:
        settings = DecodingSettings(max_tokens=256)
        writer = Writer(model, tokenizer, settings, task=task, device=torch.device("cpu"))
        return writer.write([source])[0][0]

    shown = [("text", text), ("molecule", smiles)]
    if config.loss.task in ("genmol", "both"):
        shown.append(("molecule written for the text", written("generation", text)))
    if config.loss.task in ("gentext", "both"):
        shown.append(("text written for the molecule", written("captioning", smiles)))
    for name, value in shown:
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    page = visualize(out / "hierarchical", pairs, out / "alignment")
    console.print(f"what matches what: {page}")


def _train(out: Path, name: str, config: Path, corpus: Path, overrides: Sequence[str]) -> None:
    """Two ranks: on two GPUs, or on the CPU; a single GPU can only carry one."""
    ranks = 1 if torch.cuda.device_count() == 1 else 2
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "atomas", "train", "--config", str(config),
        "--run.output_dir", str(out), "--run.name", name, "--data.corpus", str(corpus),
        *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise AtomasError(
            f"training {name} ended with code {done.returncode}; its logs are in {out / name}/attempts"
        )
