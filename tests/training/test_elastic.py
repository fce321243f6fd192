"""Real runs killed and continued with other numbers of ranks and loader workers: no sample is lost or seen twice."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from atomas.data.shard_index import write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus
from atomas.training.telemetry import read_metrics
from tests.training.conftest import SMALL, trainer_state

BATCH_SIZE = 12


def write_part(source: Path, directory: Path, start: int, stop: int) -> None:
    """Some records of a corpus as one of their own, in small shards."""
    records = list(Corpus.open(source).split("train"))[start:stop]
    assert len(records) == stop - start
    with ShardWriter(directory, "train", block_size=10, shard_bytes=12_000) as writer:
        for record in records:
            writer.write(record)
    write_index(directory, {"train": writer.index()}, counts={}, hazards={}, sources=[], options={})


def damage(directory: Path, block: int) -> set[int]:
    """Flip a bit of a block; the records in it."""
    split = Corpus.open(directory).split("train")
    path = directory / split.shard_of(block).path
    data = bytearray(path.read_bytes())
    data[split.blocks[block].offset + 20] ^= 1
    path.write_bytes(data)
    return set(range(10 * block, 10 * block + 10))


def run(folder: Path, corpus: str, *, ranks: int, workers: int, steps: int, kill_at: int = 0) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        str(Path(__file__).with_name("recording_train.py")), str(folder), str(kill_at),
        "train", *SMALL, f"--data.corpus={corpus}", f"--run.output_dir={folder}", "--run.name=run",
        f"--data.batch_size={BATCH_SIZE}", f"--data.num_workers={workers}", "--data.window_blocks=3",
        "--data.on_error=skip", "--checkpoint.every=2", f"--training.max_steps={steps}",
        "--run.silence_timeout_seconds=60",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (kill_at == 0), done.stderr[-4000:]


def taken(folder: Path, steps: int) -> tuple[dict[int, list[dict[str, Any]]], dict[int, int]]:
    """What all ranks of the last attempt that took a step noted of it, and which attempt that was."""
    of_step: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for path in folder.glob("*-*.jsonl"):
        for line in path.read_text().splitlines():
            noted = json.loads(line)
            of_step.setdefault(noted["step"], {}).setdefault(int(path.stem.split("-")[0]), []).append(noted)
    assert sorted(of_step) == list(range(1, steps + 1))
    last = {step: max(attempts) for step, attempts in of_step.items()}
    return {step: of_step[step][attempt] for step, attempt in last.items()}, last


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True], ids=["one_corpus", "mixed_and_damaged"])
def test_every_sample_is_taken_once_however_often_a_run_is_killed_and_resized(
    corpus: Path, tmp_path: Path, several: bool
) -> None:
    write_part(corpus, tmp_path / "a", 0, 120)
    where, epoch, epochs = str(tmp_path / "a"), 120, 2
    if several:
        write_part(corpus, tmp_path / "b", 120, 180)
        where, epoch, epochs = f"[{tmp_path / 'a'}, {tmp_path / 'b'}]", 180, 1
    steps = epoch * epochs // BATCH_SIZE
    run(tmp_path, where, ranks=4, workers=1, steps=steps, kill_at=5)
    bad: set[int] = set()
    if several:  # after their lengths were measured
        bad = damage(tmp_path / "a", 4) | {120 + sample for sample in damage(tmp_path / "b", 1)}
    run(tmp_path, where, ranks=2, workers=2, steps=steps, kill_at=10)
    run(tmp_path, where, ranks=3, workers=0, steps=steps)

    noted, attempt = taken(tmp_path, steps)
    assert set(attempt.values()) == {1, 2, 3}
    ranks = {1: 4, 2: 2, 3: 3}
    meant: Counter[int] = Counter()
    skipped = 0
    for step in range(1, steps + 1):
        parts = noted[step]
        assert [len(part["ids"]) for part in parts] == [BATCH_SIZE // ranks[attempt[step]]] * ranks[
            attempt[step]
        ]
        read = Counter(sample for part in parts for sample in part["ids"])
        if attempt[step] > 1:
            assert not bad & set(read), "a sample that cannot be read is never taken"
        replaced = [pair for part in parts for pair in part["skipped"]]
        skipped += len(replaced)
        read.subtract(stand_in for _, stand_in in replaced)
        read.update(sample for sample, _ in replaced)
        meant += read
    assert meant == dict.fromkeys(range(epoch), epochs), "the multiset of samples over the epochs is exact"
    train = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert sum(record["skipped"] for record in train) == skipped
    assert trainer_state(tmp_path / "run" / "checkpoints" / f"step_{steps:08d}")["skipped"] == skipped
    if several:
        assert 0 < skipped <= len(bad)
        listed = [
            json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
        ]
        assert {one["sample"] for one in listed} <= bad
        assert {(one["step"], one["sample"]) for one in listed} >= {
            (step, sample) for step in noted for part in noted[step] for sample, _ in part["skipped"]
        }
        assert all(one["reason"] == "its checksum differs from the index" for one in listed)
    else:
        assert skipped == 0
