"""kill at any byte of a save: the checkpoint before it is whole, found, and the save can be done again."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atomas.config import CheckpointConfig
from atomas.json_files import write_json
from atomas.training.checkpoint import newest_good_checkpoint, verify_checkpoint
from atomas.training.run_directory import RunDirectory
from atomas.training.saver import Saver
from atomas.training.tensor_files import write_tensors

NUMBERS = 3_000
"""float32 values of this rank's file, and half of those in the model's; the other files are smaller."""


class Small:
    """Stands in for the snapshot of a session: what is written when is the saver's."""

    def __init__(self, step: int) -> None:
        self.step = step

    def write_part(self, folder: Path) -> list[str]:
        folder.mkdir(parents=True)
        write_tensors(folder / "rank_0000.safetensors", {"weight": torch.full((NUMBERS,), float(self.step))})
        return ["rank_0000.safetensors"]

    def write_rest(self, folder: Path) -> None:
        write_tensors(folder / "model.safetensors", {"weight": torch.full((2 * NUMBERS,), float(self.step))})
        write_json(folder / "trainer.json", {"step": self.step})


def save(run: Path, step: int) -> Path:
    """A checkpoint of one process."""
    saver = Saver(RunDirectory(path=run, attempt=1), CheckpointConfig(), torch.device("cpu"))
    saver.begin(lambda _copies: Small(step), step, score=None, wait=True)  # type: ignore[arg-type,return-value]
    return run / "checkpoints" / f"step_{step:08d}"


def die_in_a_save(run: Path, step: int, byte: int) -> int:
    """Save in a child that the kernel kills when a file would grow beyond `byte`; the signal that it died of."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))
        save(run, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status)


# files of 12 and 24 kB, a manifest and others of some hundred bytes
@pytest.mark.parametrize("byte", [1, 7, 100, 300, 4_095, 4_096, 11_999, 12_100, 20_000, 24_050])
def test_the_checkpoint_before_is_continued(tmp_path: Path, byte: int) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    save(tmp_path, 1)
    assert die_in_a_save(tmp_path, 2, byte) == signal.SIGXFSZ
    assert (checkpoints / "step_00000002.partial").is_dir()
    assert (tmp_path / "LATEST").read_text(encoding="utf-8").strip() == "step_00000001"
    told: list[str] = []
    assert newest_good_checkpoint(checkpoints, "step_00000001", told.append) == checkpoints / "step_00000001"
    assert not told
    assert not list(checkpoints.glob("*.partial"))
    assert float(load_file(checkpoints / "step_00000001" / "model.safetensors")["weight"][-1]) == 1
    again = save(tmp_path, 2)
    verify_checkpoint(again)
    assert newest_good_checkpoint(checkpoints, "step_00000002", told.append) == again
    assert float(load_file(again / "model.safetensors")["weight"][-1]) == 2
