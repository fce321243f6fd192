"""Parity first, then time: every library in a process of its own."""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.console import Console

from atomas.benchmarks.data.providers import providers
from atomas.benchmarks.data.workload import MAX_TEXT_TOKENS, Mode, Workload, contents
from atomas.config import Config, DataConfig, TokenizerConfig
from atomas.data.batching import PairBatch
from atomas.data.demo import build_demo_corpus
from atomas.data.order import GlobalOrder
from atomas.data.shards import Corpus
from atomas.data.tokenizer import resolve_tokenizer
from atomas.data.tokens import open_tokens, token_lengths, tokenize_corpus
from atomas.errors import AtomasError
from atomas.training.padding import count_slots
from atomas.viz.data_benchmark import throughput_table
from atomas_kernels.bench import report as kernels_report

_WANTED = "wanted.npy"

MODES: tuple[Mode, ...] = ("tokens", "text")


class ParityError(Exception):
    """A library gives other pairs than the corpus holds."""


def run_benchmark(options: argparse.Namespace) -> None:
    """See `atomas.benchmarks.data.command`."""
    with tempfile.TemporaryDirectory(prefix="atomas-bench-data-") as scratch:
        directory = options.corpus or Path(scratch) / "corpus"
        if options.corpus is None:
            build_demo_corpus(directory, pairs=options.pairs, seed=0)
        source = _tokenize(directory, options, Path(scratch))
        workload = open_workload(directory, options.split, source, options.batch, Path(scratch))
        write_wanted(workload)
        report = _report(options, workload)
        for mode in MODES:
            for name in providers():
                arguments = (directory, options.split, source, options.batch, Path(scratch), mode, name,
                             options.seconds, options.rounds)  # fmt: skip
                row = {"op": mode, "provider": name, "batch": options.batch, **_in_own_process(arguments)}
                report.add(row)
                rate = (
                    f"{row['pairs_per_second']['p50']:,.0f} pairs/s"
                    if row["status"] == "ok"
                    else row["reason"]
                )
                print(f"{mode}, {name}: {rate}", flush=True)
    Console().print(throughput_table(report.content), markup=False)
    if options.json:
        print(options.json)
    wrong = [row["reason"] for row in report.content["rows"] if row["status"] == "wrong"]
    if wrong:
        raise AtomasError(f"not timed: {'; '.join(wrong)}")


def open_workload(directory: Path, split: str, source: Path, batch_size: int, scratch: Path) -> Workload:
    """The corpus and its tokens, opened."""
    corpus = Corpus.open(directory)
    tokenizer = resolve_tokenizer(TokenizerConfig(source=str(source)), corpus, scratch)
    tokens = open_tokens(corpus, tokenizer)
    assert tokens is not None, "tokenized before"
    return Workload(
        corpus=corpus, split=corpus.split(split), tokens=tokens, tokenizer=tokenizer,
        batch_size=batch_size, scratch=scratch,
    )  # fmt: skip


def write_wanted(workload: Workload) -> None:
    """What every library has to give, from the texts themselves, for the processes that measure."""
    batches = workload.batches("text", workload.samples("text"))
    np.save(workload.scratch / _WANTED, contents(batches, workload.split.num_records), allow_pickle=False)


def measure(
    directory: Path, split: str, source: Path, batch_size: int, scratch: Path,
    mode: Mode, name: str, seconds: float, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """One row, in this process: the pairs of an epoch against the corpus, then rates."""
    torch.set_num_threads(1)
    workload = open_workload(directory, split, source, batch_size, scratch)
    epochs = providers()[name].epochs
    batches = epochs(workload, mode)
    _check(workload, mode, name, batches)
    found = [_time(batches, seconds / rounds) for _ in range(rounds)]
    pairs = sum(part["pairs"] for part in found)
    per_thousand = [1e6 * part["seconds"] / part["pairs"] for part in found]
    low, middle, high = np.quantile(per_thousand, [0.2, 0.5, 0.8]).tolist()
    return {
        "status": "ok",
        "pairs_per_second": {"p20": 1e6 / high, "p50": 1e6 / middle, "p80": 1e6 / low},
        "ms": {"p20": low, "p50": middle, "p80": high},
        "pairs_per_cpu_second": pairs / sum(part["own_cpu"] + part["worker_cpu"] for part in found),
        "own_cpu_us_per_pair": 1e6 * sum(part["own_cpu"] for part in found) / pairs,
        "worker_cpu_us_per_pair": 1e6 * sum(part["worker_cpu"] for part in found) / pairs,
        "pairs": pairs,
    }


def _check(workload: Workload, mode: Mode, name: str, batches: Iterator[PairBatch]) -> None:
    """Every pair of the corpus once in the first epoch, with the same ids."""
    wanted = np.load(workload.scratch / _WANTED)
    got = contents(batches, len(wanted))
    if not np.array_equal(got, wanted):
        wrong = len(wanted) - len(set(map(bytes, got)) & set(map(bytes, wanted)))
        raise ParityError(
            f"{name} ({mode}) gives {len(np.unique(got['number']))} different pairs of {len(wanted)}, "
            f"and {wrong} that it should give are not those of the corpus"
        )


def _time(batches: Iterator[PairBatch], seconds: float) -> dict[str, float]:
    workers = psutil.Process().children(recursive=True)
    pairs = 0
    own, others, start = time.process_time(), _cpu(workers), time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        pairs += len(next(batches))
    return {
        "pairs": pairs,
        "seconds": elapsed,
        "own_cpu": time.process_time() - own,
        "worker_cpu": _cpu(workers) - others,
    }


def _cpu(processes: list[psutil.Process]) -> float:
    """Processor seconds of other processes so far."""
    times = [process.cpu_times() for process in processes if process.is_running()]
    return sum(time.user + time.system for time in times)


def _in_own_process(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """The row, or why there is none."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=_one_core) as pool:
        try:
            return pool.apply(_caught, arguments)
        except ParityError as error:
            return {"status": "wrong", "reason": str(error)}


def _caught(*arguments: Any) -> dict[str, Any]:
    try:
        return measure(*arguments)
    except ParityError:
        raise
    except ImportError as error:
        return {"status": "unavailable", "reason": f"not installed: {error}".splitlines()[0]}
    except Exception as error:  # whatever another library fails with is a row
        if arguments[6].startswith("atomas"):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return {"status": "failed", "reason": f"{type(error).__name__}: {first}"}


def _one_core() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    # A worker of a DataLoader is a child, which a daemon may not have.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def _tokenize(directory: Path, options: argparse.Namespace, scratch: Path) -> Path:
    """The tokens of the corpus, which are left beside it; returns their folder, which holds the tokenizer."""
    source = options.tokenizer or "corpus"
    config = TokenizerConfig(source=source)
    tokenizer = resolve_tokenizer(config, Corpus.open(directory), scratch, split=options.split)
    return tokenize_corpus(directory, tokenizer)


def padding_shares(workload: Workload, token_budget: int) -> dict[str, float]:
    """Shares of slots without a token, over batches of the stream: attention on the CPU and on an accelerator, and what
    padding every batch to its longest text and SMILES would be.
    """
    lengths = token_lengths(workload.tokens, workload.split.name)
    order = GlobalOrder(workload.split.blocks.num_records, seed=0, window_blocks=workload.window_blocks)
    config = Config(data=DataConfig(token_budget=token_budget))
    counted = np.zeros((3, 2), dtype=np.int64)
    for number in range(min(50, len(order) // workload.batch_size)):
        members = order.indices(number * workload.batch_size, (number + 1) * workload.batch_size)
        text, smiles = lengths.seen(members, MAX_TEXT_TOKENS)
        longest = (int(text.max()) + int(smiles.max())) * len(members)
        counted += [
            count_slots(torch.from_numpy(text), torch.from_numpy(smiles), config, torch.device("cpu")),
            count_slots(torch.from_numpy(text), torch.from_numpy(smiles), config, torch.device("cuda")),
            (int(text.sum() + smiles.sum()), longest),
        ]
    cpu, accelerator, padded = (1 - counted[:, 0] / counted[:, 1]).tolist()
    return {"cpu": cpu, "accelerator": accelerator, "to_longest": padded}


def _report(options: argparse.Namespace, workload: Workload) -> kernels_report.Report:
    lengths = [np.load(workload.tokens.directory / workload.split.name / "lengths.npy", mmap_mode="r")]
    head = kernels_report.head(
        torch.device("cpu"),
        ("webdataset", "mosaicml-streaming", "litdata", "datasets", "tokenizers", "safetensors", "numpy"),
    ) | {
        "benchmark": "data",
        "corpus": options.corpus.name if options.corpus else f"{options.pairs} generated pairs",
        "pairs": workload.split.num_records,
        "tokens_per_pair": float(lengths[0].sum(dtype=np.int64) / workload.split.num_records),
        "vocab_size": workload.tokenizer.vocab_size,
        "window_blocks": workload.window_blocks,
        "load_average": os.getloadavg()[0],
        "padding": [
            {"token_budget": budget, **padding_shares(workload, budget)} for budget in (512, 4096, 16384)
        ],
        "length_distribution": None,
    }
    try:
        return kernels_report.Report(options.json, head)
    except ValueError as error:
        raise AtomasError(str(error)) from error
