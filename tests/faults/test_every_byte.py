"""kill at any byte of a save: the checkpoint before it is whole, found, and the save can be done again."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from atomas.training.checkpoint import newest_good_checkpoint, save_checkpoint, verify_checkpoint

CPU = torch.device("cpu")
NUMBERS = 3_000
"""float32 values in each of two files; trainer.json and the manifest are smaller."""


def save(folder: Path, step: int) -> Path:
    """A checkpoint of one process: a large file of its own, then what rank 0 adds."""

    def part(partial: Path) -> None:
        save_file({"weight": torch.full((NUMBERS,), float(step))}, partial / "rank_0000.safetensors")

    def rest(partial: Path) -> None:
        save_file({"weight": torch.full((2 * NUMBERS,), float(step))}, partial / "model.safetensors")
        (partial / "trainer.json").write_text(f'{{"step": {step}}}', encoding="utf-8")

    return save_checkpoint(folder, step, part, rest, device=CPU)


def die_in_a_save(folder: Path, step: int, byte: int) -> int:
    """Save in a child that the kernel kills when a file would grow beyond `byte`; the signal that it died of."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))
        save(folder, step)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status)


# files of 12 and 24 kB, a manifest of some 400 bytes
@pytest.mark.parametrize("byte", [1, 7, 100, 300, 4_095, 4_096, 11_999, 12_100, 20_000, 24_050])
def test_the_checkpoint_before_is_continued(tmp_path: Path, byte: int) -> None:
    save(tmp_path, 1)
    assert die_in_a_save(tmp_path, 2, byte) == signal.SIGXFSZ
    assert (tmp_path / "step_00000002.partial").is_dir()
    told: list[str] = []
    assert newest_good_checkpoint(tmp_path, "step_00000001", told.append) == tmp_path / "step_00000001"
    assert not told
    assert not list(tmp_path.glob("*.partial"))
    assert float(load_file(tmp_path / "step_00000001" / "model.safetensors")["weight"][-1]) == 1
    again = save(tmp_path, 2)
    verify_checkpoint(again)
    assert newest_good_checkpoint(tmp_path, "step_00000001", told.append) == again
    assert float(load_file(again / "model.safetensors")["weight"][-1]) == 2
