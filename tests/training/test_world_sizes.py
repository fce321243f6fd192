"""A run goes on with other numbers of ranks, 1 -> 2 -> 4 -> 1, as if it had always been one process."""

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from atomas.training.telemetry import read_metrics
from tests.training.conftest import command

pytestmark = pytest.mark.slow

SAME = (
    "--model.dropout_rate=0", "--schedule.name=constant", "--checkpoint.every=2", "--momentum.queue_size=20",
)  # fmt: skip
"""Each rank drops others, and a cosine depends on the number of steps."""
LOSSES = (
    "loss", "loss/global", "loss/lm", "loss/hierarchical", "loss/level_0", "loss/level_1", "loss/level_2",
)  # fmt: skip

WITHOUT_GRADIENT = (".2.bias", ".score.bias")
"""Of the importance and of the cluster score: a softmax does not see what is added to all of its logits. What rounding
leaves of the gradient is all that Adam has, and so makes steps of the learning rate's size of it."""


def records(run: Path) -> list[dict[str, float]]:
    """All losses of every step."""
    train = [record for record in read_metrics(run) if record["kind"] == "train"]
    return [{name: record[name] for name in LOSSES} for record in train]


def test_one_two_four_one(corpus: Path, tmp_path: Path) -> None:
    """Losses, weights, momentum copy and queue of 8 steps; the samples of each step decide all of them.

    The clusters are those of the run that is not moved. They are a choice: other numbers of ranks add in another
    order, tokens differ in their last digits, and among 2,000 a step there is one now and then for which this decides
    which of two nearly equal tokens becomes a centre. What follows from it is no rounding any more.
    """
    pins = tmp_path / "pins"
    pins.mkdir()

    def train(name: str, steps: int, ranks: int = 1, stage: int = 1) -> None:
        options = (*SAME, f"--deepspeed.zero_stage={stage}", f"--training.max_steps={steps}")
        atomas = command(corpus, tmp_path / "runs", name, options, ranks)
        end = atomas.index("train")  # behind -m atomas
        atomas[end - 2 : end] = [str(Path(__file__).with_name("pinned_clusters.py")), str(pins)]
        done = subprocess.run(atomas, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    train("alone", 8)
    for ranks, steps in ((1, 2), (2, 4), (4, 6), (1, 8)):
        train("moved", steps, ranks, stage=min(3, ranks))
    alone, moved = tmp_path / "runs" / "alone", tmp_path / "runs" / "moved"
    assert len(records(moved)) == 8
    for one, other in zip(records(moved), records(alone), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    notes = [json.loads(path.read_text()) for path in pins.glob("own-*.json")]
    assert sum(note["sequences"] for note in notes) == 8 * 8 * 4  # steps, pairs, modalities and levels
    assert sum(note["differ"] for note in notes) <= 5  # by themselves they choose nearly the same
    for name in ("model/model.safetensors", "model/momentum.safetensors", "queue.safetensors"):
        one, other = (load_file(run / "checkpoints/step_00000008" / name) for run in (alone, moved))
        assert one.keys() == other.keys()
        for key, value in one.items():
            if key.endswith(WITHOUT_GRADIENT):
                continue
            assert_close(other[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    states = [
        json.loads((run / "checkpoints/step_00000008/trainer.json").read_text()) for run in (alone, moved)
    ]
    assert states[0]["samples"] == states[1]["samples"]
    assert states[0]["queue"] == states[1]["queue"]
