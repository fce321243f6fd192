"""Real training runs, small: a corpus of a few hundred pairs, a model of a few thousand weights."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from atomas.data.demo import build_demo_corpus
from atomas.training.telemetry import read_metrics
from tests.ranks import run_command

SMALL = (
    "--tokenizer.vocab_size=400", "--data.batch_size=8", "--data.token_budget=512", "--data.num_workers=0",
    "--model.d_model=32", "--model.d_kv=8", "--model.d_ff=32", "--model.num_layers=1",
    "--model.num_decoder_layers=1", "--model.num_heads=2", "--model.polymerization_heads=2",
    "--model.dropout_rate=0.1", "--loss.lm_weight=1", "--momentum.queue_size=20",
    "--optimizer.learning_rate=1e-3", "--schedule.warmup_steps=3", "--run.device=cpu", "--run.threads=1",
    "--evaluation.every=0", "--evaluation.max_pairs=9", "--checkpoint.every=0", "--training.log_every=1",
)  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "corpus"
    build_demo_corpus(folder, pairs=240, seed=3, workers=1)
    return folder


Trainer = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def train(corpus: Path, tmp_path: Path) -> Trainer:
    """`train("name", "--key=value", ..., ranks=2)` runs in `tmp_path / "runs" / name`."""

    def run(
        name: str, *overrides: str, ranks: int = 1, code: int | None = 0
    ) -> "subprocess.CompletedProcess[str]":
        arguments = command(corpus, tmp_path / "runs", name, overrides, ranks)
        done = run_command(arguments[arguments.index("train") :], ranks, tmp_path / f"{name}.stderr")
        if code is not None:
            assert done.returncode == code, done.stderr[-4000:]
        return done

    return run


def command(corpus: Path, runs: Path, name: str, overrides: Sequence[str], ranks: int) -> list[str]:
    python = [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    where = [f"--data.corpus={corpus}", f"--run.output_dir={runs}", f"--run.name={name}"]
    return [*python, "-m", "atomas", "train", *SMALL, *where, *overrides]


def losses(run: Path) -> list[float]:
    """Total loss of every step."""
    return [record["loss"] for record in read_metrics(run) if record["kind"] == "train"]


def last_record(run: Path) -> dict[str, Any]:
    return [record for record in read_metrics(run) if record["kind"] == "train"][-1]


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
