"""A run goes on with other numbers of ranks, 1 -> 2 -> 4 -> 1, as if it had always been one process."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.training.conftest import Trainer, losses

pytestmark = pytest.mark.slow

SAME = (
    "--model.dropout_rate=0", "--schedule.name=constant", "--loss.hierarchical_weight=0", "--checkpoint.every=2",
    "--momentum.queue_size=20",
)  # fmt: skip
"""Each rank drops others, a cosine depends on the number of steps, and clusters are a choice that rounding may turn."""


def test_one_two_four_one(train: Trainer, tmp_path: Path) -> None:
    """Losses, weights, momentum copy and queue of 8 steps; the samples of each step decide all of them."""
    train("alone", *SAME, "--training.max_steps=8")
    for ranks, steps in ((1, 2), (2, 4), (4, 6), (1, 8)):
        stage = f"--deepspeed.zero_stage={min(3, ranks)}"
        train("moved", *SAME, stage, f"--training.max_steps={steps}", ranks=ranks)
    alone, moved = tmp_path / "runs" / "alone", tmp_path / "runs" / "moved"
    assert len(losses(moved)) == 8
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-4)
    for name in ("model/model.safetensors", "model/momentum.safetensors", "queue.safetensors"):
        one, other = (load_file(run / "checkpoints/step_00000008" / name) for run in (alone, moved))
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_close(other[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    states = [
        json.loads((run / "checkpoints/step_00000008/trainer.json").read_text()) for run in (alone, moved)
    ]
    assert states[0]["samples"] == states[1]["samples"]
    assert states[0]["queue"] == states[1]["queue"]
