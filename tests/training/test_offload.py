"""Offload of optimizer and weights: to host memory and to files, with real DeepSpeed on gloo ranks."""

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atomas.config import DeepSpeedConfig
from atomas.errors import AtomasError
from atomas.training.nvme import load_operator, operator_file
from atomas.training.swap_files import SwapFolder, file_system
from tests.training.conftest import Trainer, command, losses

SHAPE = (
    "--model.d_model=256", "--model.d_kv=64", "--model.num_heads=4", "--model.d_ff=2048", "--model.num_layers=2",
    "--training.gradient_accumulation_steps=2", "--training.micro_batch_size=2",
    "--model.activation_checkpointing=true", "--training.max_steps=4", "--deepspeed.zero_stage=3",
    "--deepspeed.extra={zero_optimization: {sub_group_size: 600000}}", "--checkpoint.every=2", "--evaluation.every=2",
)  # fmt: skip
"""Several sub-groups of more than the 1 MiB from which on DeepSpeed uses files; some weights lie in files too."""

needs_operator = pytest.mark.skipif(
    not operator_file().exists(),
    reason="DeepSpeed's async_io operator is not compiled here, which takes long",
)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    if file_system(folder) in ("tmpfs", "ramfs"):
        pytest.skip(f"{folder} lies in memory")
    return folder


@needs_operator
@pytest.mark.slow
def test_nvme_is_cpu_offload_bit_for_bit_and_its_checkpoints_are_anybodys(
    train: Trainer, tmp_path: Path, disk: Path
) -> None:
    """Dropout, accumulation, gradient caching, recomputation, momentum, queues and evaluation are all on."""
    nvme, cpu = ("--deepspeed.offload=nvme", f"--deepspeed.nvme_path={disk}"), ("--deepspeed.offload=cpu",)
    runs = tmp_path / "runs"
    train("cpu", *SHAPE, *cpu, ranks=2)
    train("nvme", *SHAPE, *nvme, ranks=2)
    whole = losses(runs / "cpu")
    assert len(whole) == 4
    assert losses(runs / "nvme") == whole
    assert not list(disk.iterdir())
    newest = "checkpoints/step_00000004"
    assert len(list((runs / "nvme" / newest / "shards").iterdir())) > 2  # a sub-group at a time
    for name, saved_with, continued_with in (
        ("again", "nvme", nvme),
        ("off", "nvme", cpu),
        ("on", "cpu", nvme),
    ):
        shutil.copytree(runs / saved_with, runs / name)
        shutil.rmtree(runs / name / newest)  # as if the run had died after step 2 was saved
        done = train(name, *SHAPE, *continued_with, ranks=2)
        assert "step_00000002 at step 2" in done.stderr
        assert losses(runs / name) == whole, name
        for file in ("model/model.safetensors", "model/momentum.safetensors"):
            one, other = (load_file(runs / run / newest / file) for run in (name, "cpu"))
            assert all(torch.equal(one[key], value) for key, value in other.items()), (name, file)


@needs_operator
@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ("--training.precision=bf16",),
        ("--loss.hierarchical_weight=0", "--momentum.forward=layerwise"),  # weights without a gradient
        ("--loss.task=both", "--data.batch_size=9", "--training.micro_batch_size=1"),
    ],
)
def test_nvme_is_cpu_offload_in_other_runs(
    train: Trainer, tmp_path: Path, disk: Path, keys: tuple[str, ...]
) -> None:
    ranks = 3 if "--data.batch_size=9" in keys else 2
    for name, offload in (("cpu", ()), ("nvme", (f"--deepspeed.nvme_path={disk}",))):
        train(
            name, *SHAPE, *keys, f"--deepspeed.offload={name}", *offload, "--checkpoint.every=0", ranks=ranks
        )
    assert losses(tmp_path / "runs" / "nvme") == losses(tmp_path / "runs" / "cpu")


@needs_operator
@pytest.mark.slow
def test_files_of_a_killed_run_go_when_the_next_one_starts(
    train: Trainer, corpus: Path, tmp_path: Path, disk: Path
) -> None:
    nvme = ("--deepspeed.offload=nvme", f"--deepspeed.nvme_path={disk}")
    endless = [*SHAPE, *nvme, "--training.max_steps=500", "--checkpoint.every=1", "--evaluation.every=0"]
    metrics = tmp_path / "runs/killed/attempts/1/metrics.jsonl"
    with subprocess.Popen(command(corpus, tmp_path / "runs", "killed", endless, 1)) as process:
        deadline = time.monotonic() + 300
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        (left,) = disk.iterdir()
        other = SwapFolder(disk)  # of a run beside it: neither touches the other's
        assert left.exists()
        process.kill()
    assert left.exists()
    done = train("killed", *SHAPE, *nvme, "--training.max_steps=6", "--evaluation.every=0")
    assert "continuing" in done.stderr
    assert list(disk.iterdir()) == [other.path]
    assert len(losses(tmp_path / "runs/killed")) == 6


def test_a_folder_is_its_process_own_and_goes_with_it(tmp_path: Path) -> None:
    if file_system(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip(f"{tmp_path} lies in memory")
    first = SwapFolder(tmp_path)
    unlocked = tmp_path / f"{first.path.name[:-8]}ofkilled"
    unlocked.mkdir()
    (unlocked / "lock").touch()
    elsewhere = tmp_path / "atomas-swap-0-another-host-x"
    elsewhere.mkdir()
    second = SwapFolder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([first.path, second.path, elsewhere])
    first.remove()
    assert sorted(tmp_path.iterdir()) == sorted([second.path, elsewhere])
    gone = second.path
    del second
    assert not gone.exists()


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        AtomasError, match=r"^deepspeed.nvme_path = '.*/nowhere': there is no such folder on .*$"
    ):
        SwapFolder(tmp_path / "nowhere")
    memory = Path("/dev/shm")
    if file_system(memory) == "tmpfs":
        with pytest.raises(
            AtomasError, match=r"^deepspeed.nvme_path = '/dev/shm' is tmpfs, which lies in memory"
        ):
            SwapFolder(memory)
    if file_system(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip(f"{tmp_path} lies in memory")
    folder = SwapFolder(tmp_path)
    folder.check_space(2**20)
    with pytest.raises(AtomasError, match=r"MiB left, the ranks of this node need 1,073,741,824 MiB$"):
        folder.check_space(2**50)
    folder.remove()

    def refuse(path: Any, flags: int, *rest: Any, **keys: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return original(path, flags, *rest, **keys)

    original = os.open
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        AtomasError, match=r"has no direct access \(O_DIRECT\): Invalid argument; name a folder on a"
    ):
        SwapFolder(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_without_write_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(AtomasError, match="cannot be written to: Permission denied"):
        SwapFolder(tmp_path)


def test_an_operator_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def fail(self: object, verbose: bool = False) -> None:
        raise RuntimeError("Unable to JIT load the async_io op\ndue to it not being compatible")

    monkeypatch.setattr(AsyncIOBuilder, "load", fail)
    with pytest.raises(
        AtomasError, match=r"needs DeepSpeed's async_io operator.*libaio-dev.*not being compatible\)$"
    ):
        load_operator()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero_stage": 2, "nvme_path": "/scratch"}, "needs deepspeed.zero_stage = 3, not 2"),
        ({"zero_stage": 3}, "deepspeed.nvme_path, a folder on a local disk, need each other"),
        ({"zero_stage": 3, "offload": "cpu", "nvme_path": "/scratch"}, "they are 'cpu' and '/scratch'"),
    ],
)
def test_configurations_that_make_no_sense(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(AtomasError, match=message):
        DeepSpeedConfig(**({"offload": "nvme"} | keys))
