"""`atomas launch --dry-run`: exactly what would happen, the batch arithmetic, soon and without torch."""

import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.conftest import ROOT, Launch

CONFIG = str(ROOT / "configs" / "train" / "demo.yaml")


def atomas(launch: Launch, *options: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "atomas", "launch", *options], cwd=launch.folder, env=launch.environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_dry_run_says_all_and_does_nothing(launch: Launch) -> None:
    steps = ("--training.gradient_accumulation_steps=3", "--training.micro_batch_size=4")
    train = ("train", "--config", CONFIG, "--run.name", "my run", *steps)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = atomas(
        launch,
        "--backend=slurm",
        "--nodes=2",
        "--gpus-per-node=4",
        "--time=2:00:00",
        "--dry-run",
        "--",
        *train,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "slurm: 2 hosts x 4" in output
    assert (
        "batch: 64 pairs / 8 ranks = 8 pairs per rank in 2 micro-batches of 4; x 3 batches per step x 300 steps "
        "= 57600 pairs" in output
    )
    assert f"run: {launch.folder}/runs/my run" in output
    assert "#SBATCH --time=02:00:00" in output
    assert shlex.join(train) in output
    assert output.splitlines()[-1].strip().startswith("sbatch --parsable ")
    assert not (launch.folder / "runs").exists()
    assert not (launch.folder / "state").exists()
    # of processor time, because the machine may be busy with other things
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_what_a_dry_run_prints_can_be_run(launch: Launch) -> None:
    profile = str(launch.profile(""))
    job = ["--cluster", profile, "--gpus-per-node=1", f"--run-directory={launch.run}"]
    output = launch(*job, "--dry-run", "--", "train", str(launch.run), "2", "$(x)")
    line = output.splitlines()[-1]
    subprocess.run(["bash", "-c", line], cwd=launch.folder, env=launch.environment(), check=True)
    assert (launch.run / "step_0").read_text(encoding="utf-8") == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--", "train", "--config", CONFIG, "--data.batch_sise", "8"), "unknown key 'data.batch_sise'"),
        (
            ("--gpus-per-node=3", "--", "train", "--config", CONFIG),
            "cannot be divided among 3 ranks; numbers that",
        ),
        (
            ("--", "train", "--config", CONFIG, "--training.micro_batch_size=5"),
            "training.micro_batch_size = 5 does not divide the 64 pairs of a rank",
        ),
        (
            ("train", "--config", CONFIG),
            "'--config' is no option of launch; options of the command stand after --",
        ),
        (("--cluster=nowhere", "--", "train"), "no cluster 'nowhere'"),
        (("--env=NOT_SET", "--", "train"), "--env NOT_SET: it is not set in this shell"),
        (("--gpus-per-node=0", "--", "train"), "GPUs per node: 0, and at least 1 is needed"),
        (("--time=soon", "--", "train"), "time limit 'soon' is not of the form"),
        ((), "no command: give it after --"),
        (("status", "7"), "no job '7'; the newest are: none"),
        (("logs",), "`logs` takes one JOB"),
    ],
)
def test_mistakes(options: tuple[str, ...], message: str, launch: Launch) -> None:
    assert message in atomas(launch, "--dry-run", *options, code=2)


def test_later_starts_keep_what_earlier_ones_wrote(launch: Launch) -> None:
    profile = str(launch.profile("backend: torchrun\nhosts: [n1]\n"))
    (launch.run / "launch" / "7").mkdir(parents=True)
    output = launch("--cluster", profile, f"--run-directory={launch.run}", "--dry-run", "--", "train")
    assert f"would write {launch.run}/launch/8/node_0.sh" in output


def test_variables_of_the_shell_that_matter_go_along(launch: Launch, tmp_path: Path) -> None:
    profile = str(launch.profile("backend: torchrun\nhosts: [n1]\nenvironment: {NCCL_DEBUG: WARN}\n"))
    environ = {
        "NCCL_DEBUG": "INFO",
        "UCX_TLS": "rc x",
        "HF_TOKEN": "secret",
        "DS_API_KEY": "secret",
        "OTHER": "1",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    output = launch("--cluster", profile, "--dry-run", "--env=OTHER", "--", "train", environ=environ)
    assert "export NCCL_DEBUG=WARN" in output
    assert "export UCX_TLS='rc x'" in output
    assert "export OTHER=1" in output
    assert "secret" not in output
    assert "CUDA_VISIBLE_DEVICES" not in output
