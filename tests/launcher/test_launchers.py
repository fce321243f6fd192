"""The same training run from every launcher: real processes, real Open MPI, a real Slurm of two nodes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from atomas.data.demo import build_demo_corpus
from tests.launcher.slurm_cluster import missing_programs, slurm_cluster
from tests.training.conftest import SMALL, losses

pytestmark = pytest.mark.slow

STEPS = 3
PLACEMENT = (
    "import dataclasses, json, sys; from atomas_launcher.placement import find_placement;"
    "sys.stdout.write(json.dumps(dataclasses.asdict(find_placement())) + chr(10))"
)
"""A program that writes where it stands; standard library only, so that it starts at once."""
OTHER_LAUNCHERS = ("SLURM_", "OMPI_", "PMI", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "TORCHELASTIC_")
"""Prefixes of variables that these tests may themselves have been started with."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
MPIRUN = ("mpirun", "--oversubscribe", "--bind-to", "none")


class Folder:
    """Where the runs of this module lie, and their losses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        build_demo_corpus(path / "corpus", pairs=240, seed=3, workers=1)

    def train(
        self,
        name: str,
        *launcher: str,
        program: tuple[str, ...] = ("-m", "atomas"),
        environ: Mapping[str, str] | None = None,
    ) -> list[float]:
        """`LAUNCHER... -m atomas train ...` with a model of a few thousand weights; every step's loss."""
        options = (
            f"--data.corpus={self.path / 'corpus'}", f"--run.output_dir={self.path}", f"--run.name={name}",
            f"--training.max_steps={STEPS}",
        )  # fmt: skip
        run([*launcher, *program, "train", *SMALL, *options], environ or {})
        found = losses(self.path / name)
        assert len(found) == STEPS
        return found


def run(command: list[str], environ: Mapping[str, str]) -> str:
    """Standard output of a command that must succeed; whatever it started ends with it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(OTHER_LAUNCHERS)}
    # Open MPI asks for both before it starts as root, as in a container
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = subprocess.Popen(
        command, env={**clean, **root, "OMP_NUM_THREADS": "1", **environ}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-4000:]
    return output


def placements(command: list[str], environ: Mapping[str, str]) -> list[dict[str, object]]:
    """What each process that the command starts finds, by rank."""
    lines = run([*command, sys.executable, "-c", PLACEMENT], environ).splitlines()
    return sorted(map(json.loads, lines), key=lambda each: each["rank"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("launchers"))


@pytest.fixture(scope="module")
def alone(folder: Folder) -> list[float]:
    """Losses of plain `python -m atomas train`."""
    return folder.train("python", sys.executable)


@pytest.fixture(scope="module")
def two_ranks(folder: Folder) -> list[float]:
    """Losses of torchrun with two ranks."""
    return folder.train("torchrun", *TORCHRUN, "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"needs Slurm and munge on this host; it lacks {', '.join(missing)}")
    with slurm_cluster() as environ:
        yield environ


@pytest.fixture(scope="module")
def openmpi() -> None:
    if shutil.which("mpirun") is None:
        pytest.skip("needs Open MPI: there is no mpirun on this host")
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" not in version and "OpenRTE" not in version:
        pytest.skip("needs Open MPI: the mpirun of this host is another")


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def test_one_process_and_two_ranks_are_different_runs(alone: list[float], two_ranks: list[float]) -> None:
    """So that the comparisons below can fail."""
    assert alone != pytest.approx(two_ranks, rel=1e-6)


def test_deepspeed(folder: Folder, two_ranks: list[float]) -> None:
    deepspeed = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if deepspeed is None:
        pytest.skip("needs the deepspeed command")
    # not by its first line: that python need not be this one
    launcher = (
        sys.executable, deepspeed, "--num_accelerators=2", f"--master_port={free_port()}",
    )  # fmt: skip
    found = folder.train(
        "deepspeed", *launcher, program=("--module", "atomas"), environ={"DS_ACCELERATOR": "cpu"}
    )
    assert found == pytest.approx(two_ranks, rel=1e-6)


@pytest.mark.parametrize("backend", ["local", "torchrun", "deepspeed"])
def test_atomas_launch(folder: Folder, two_ranks: list[float], backend: str) -> None:
    launcher = (sys.executable, "-m", "atomas", "launch", f"--backend={backend}", "--gpus-per-node=2", "--")
    environ = {"XDG_STATE_HOME": str(folder.path)}
    found = folder.train(f"launch-{backend}", *launcher, program=(), environ=environ)
    assert found == pytest.approx(two_ranks, rel=1e-6)


@pytest.mark.usefixtures("openmpi")
def test_mpirun(folder: Folder, two_ranks: list[float]) -> None:
    """On one host, without MASTER_ADDR."""
    assert folder.train("mpirun", *MPIRUN, "-np", "2", sys.executable) == pytest.approx(two_ranks, rel=1e-6)


def test_srun(folder: Folder, slurm: dict[str, str], two_ranks: list[float]) -> None:
    """One task on each of two nodes."""
    launcher = ("srun", "--nodes=2", "--ntasks-per-node=1", sys.executable)
    assert folder.train("srun", *launcher, environ=slurm) == pytest.approx(two_ranks, rel=1e-6)


def test_srun_of_one_task(folder: Folder, slurm: dict[str, str], alone: list[float]) -> None:
    found = folder.train("srun-single", "srun", "--ntasks=1", sys.executable, environ=slurm)
    assert found == pytest.approx(alone, rel=1e-6)


def test_torchrun_inside_srun(folder: Folder, slurm: dict[str, str], two_ranks: list[float]) -> None:
    """One torchrun on each of two nodes."""
    launcher = (
        "srun", "--nodes=2", "--ntasks-per-node=1", *TORCHRUN, "--nnodes=2", "--nproc-per-node=1",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}",
    )  # fmt: skip
    assert folder.train("srun-torchrun", *launcher, environ=slurm) == pytest.approx(two_ranks, rel=1e-6)


@pytest.mark.usefixtures("openmpi")
def test_mpirun_inside_an_allocation(folder: Folder, slurm: dict[str, str], two_ranks: list[float]) -> None:
    """Both sets of variables are there; Open MPI starts its daemons with srun."""
    launcher = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", *MPIRUN, "-np", "2", sys.executable)
    assert folder.train("salloc-mpirun", *launcher, environ=slurm) == pytest.approx(two_ranks, rel=1e-6)


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_nodes_with_different_numbers_of_tasks(slurm: dict[str, str], mpi: str) -> None:
    found = placements(["srun", "--nodes=2", "--ntasks=3", f"--mpi={mpi}"], slurm)
    assert [each["launcher"] for each in found] == ["slurm"] * 3
    assert [(each["rank"], each["world_size"]) for each in found] == [(0, 3), (1, 3), (2, 3)]
    assert [(each["local_rank"], each["local_world_size"]) for each in found] == [(0, 2), (1, 2), (0, 1)]
    assert len({(each["address"], each["port"]) for each in found}) == 1


@pytest.mark.usefixtures("openmpi")
def test_mpirun_on_nodes_with_different_numbers_of_slots(slurm: dict[str, str]) -> None:
    found = placements(["salloc", "--quiet", "--nodes=2", "--ntasks=3", *MPIRUN], slurm)
    assert [each["launcher"] for each in found] == ["openmpi"] * 3
    assert [(each["local_rank"], each["local_world_size"]) for each in found] == [(0, 2), (1, 2), (0, 1)]
    assert {each["address"] for each in found} == {"127.0.0.1"}
    assert len({each["port"] for each in found}) == 1
