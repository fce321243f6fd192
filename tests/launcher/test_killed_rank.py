"""Kill -9 of a rank of a real run: `atomas launch --restarts` continues it to the same losses, by itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atomas.data.demo import build_demo_corpus
from tests.training.conftest import SMALL

pytestmark = pytest.mark.slow

STEPS = 30


def launch(folder: Path, name: str, *options: str) -> "subprocess.Popen[str]":
    keys = (f"--data.corpus={folder / 'corpus'}", f"--run.output_dir={folder}", f"--run.name={name}")
    train = ("train", *SMALL, *keys, f"--training.max_steps={STEPS}", "--checkpoint.every=2")
    return subprocess.Popen(
        [sys.executable, "-m", "atomas", "launch", "--gpus-per-node=2", *options, "--", *train], text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(folder)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def losses(attempt: Path) -> dict[int, float]:
    """Loss of each step that an attempt has written."""
    path = attempt / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def process_of_rank(launcher: int, rank: int) -> int:
    """Which child of the launcher is this rank."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, check=True
    )
    for pid in map(int, children.stdout.split()):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the corpus, and a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("killed")
    build_demo_corpus(folder / "corpus", pairs=240, seed=3, workers=1)
    undisturbed = launch(folder, "undisturbed")
    _, errors = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, errors
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(rank: int, folder: Path) -> None:
    killed = launch(folder, f"killed_{rank}", "--restarts=2")
    first, second = (folder / f"killed_{rank}" / "attempts" / number for number in "12")
    try:
        end = time.monotonic() + 200
        while len(losses(first)) < 4:
            assert killed.poll() is None, killed.communicate()
            assert time.monotonic() < end
            time.sleep(0.1)
        os.kill(process_of_rank(killed.pid, rank), signal.SIGKILL)
        _, errors = killed.communicate(timeout=300)
    finally:
        killed.terminate()
    assert killed.returncode == 0, errors
    assert "started again in 5 s" in errors
    expected = losses(folder / "undisturbed" / "attempts" / "1")
    assert losses(second) == {step: loss for step, loss in expected.items() if step in losses(second)}
    assert max(losses(second)) == STEPS
    lost = max(losses(first)) - min(losses(second)) + 1
    assert 0 <= lost <= 2, "no more than the steps since the last checkpoint"
