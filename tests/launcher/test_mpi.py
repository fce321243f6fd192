"""`atomas launch --backend mpi` with the real Open MPI, MPICH and Intel MPI, here and over ssh to two hosts."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.cable import ADDRESSES, Cable
from tests.launcher.conftest import HOSTILE, Launch
from tests.launcher.ssh_hosts import PROGRAMS, ssh_servers
from tests.launcher.test_starts import options, ranks, started, until

ROOT_MAY = "environment: {OMPI_MCA_rmaps_base_oversubscribe: '1'}\n"
"""More processes than cores, perhaps."""
HOW_TO_GET = {
    "openmpi": "Debian: openmpi-bin",
    "mpich": "Debian: mpich",
    "intelmpi": "pip install --no-deps --target DIR impi-rt, and I_MPI_ROOT=DIR",
}


def version(*command: str) -> str:
    """What a program says of itself; nothing where it cannot be run."""
    try:
        done = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, check=False, timeout=60
        )
    except FileNotFoundError:
        return ""
    return done.stdout


@pytest.fixture(params=["openmpi", "mpich", "intelmpi"])
def mpi(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The MPI's name, and a PATH that leads to its mpirun first: several may be installed."""
    programs = tmp_path / "programs"
    programs.mkdir()
    name, environ = request.param, {"PATH": f"{programs}:{os.environ['PATH']}"}
    if name == "openmpi":
        found = shutil.which("mpirun.openmpi") or shutil.which("mpirun")
        told = version(found or "none")
        is_there, program = "Open MPI" in told or "OpenRTE" in told, "mpirun"
    elif name == "mpich":
        found = shutil.which("mpiexec.hydra") or shutil.which("mpiexec")
        is_there, program = found and "HYDRA" in version(found), "mpiexec"
    else:
        root = os.environ.get("I_MPI_ROOT", "/none")
        found = shutil.which("mpirun", path=f"{root}/bin")
        is_there, program = "Intel" in version(f"{root}/bin/mpiexec.hydra"), "mpirun"
        environ |= {"PATH": f"{programs}:{root}/bin:{os.environ['PATH']}", "I_MPI_ROOT": root}
    if not is_there:
        pytest.skip(f"needs {name} on this host ({HOW_TO_GET[name]})")
    # by a script and not a link: MPICH looks for its other programs beside the name that it was called by
    (programs / program).write_text(f'#!/bin/sh\nexec {found} "$@"\n', encoding="utf-8")
    (programs / program).chmod(0o755)
    return {"mpi": name, **environ}


def test_on_this_host(launch: Launch, mpi: dict[str, str]) -> None:
    profile = f"backend: mpi\nmpi: {mpi.pop('mpi')}\n{ROOT_MAY}"
    launch(*options(launch, profile, 3, "--env=ODD=$(touch pwned)"), *HOSTILE, environ=mpi)
    found = ranks(launch.run)
    launcher = "openmpi" if found[0]["launcher"] == "openmpi" else "mpich"
    assert [(each["rank"], each["world_size"], each["launcher"]) for each in found] == [
        (0, 2, launcher),
        (1, 2, launcher),
    ]
    assert [(each["local_rank"], each["local_world_size"]) for each in found] == [(0, 2), (1, 2)]
    assert [tuple(each["arguments"]) for each in found] == [HOSTILE, HOSTILE]
    assert {each["environment"]["ODD"] for each in found} == {"$(touch pwned)"}
    assert found[0]["port"] == found[1]["port"] != 29500
    assert not list(launch.folder.rglob("pwned"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_ranks_have_time_to_save(launch: Launch, mpi: dict[str, str], number: int) -> None:
    """Open MPI would kill them a second after SIGTERM, and Intel MPI's mpirun would leave them behind."""
    profile = f"backend: mpi\nmpi: {mpi.pop('mpi')}\n{ROOT_MAY}"
    given = options(launch, profile, 1000, "--env=STAND_IN_SAVES=3")
    with started(launch, *given, environ=mpi) as process:
        until(lambda: (launch.run / "step_1").exists() and (launch.run / "step_0").exists(), process)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert "rank 0 saved" in output + errors
    assert "rank 1 saved" in output + errors
    assert process.returncode == 75


@pytest.fixture
def cable() -> Iterator[Cable]:
    missing = [
        name
        for name in ("ip", "unshare", *PROGRAMS)
        if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} on this host")
    cable = Cable()
    try:
        cable.build()
        yield cable
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    finally:
        cable.remove()


@pytest.mark.slow
def test_over_ssh_to_two_hosts(launch: Launch, mpi: dict[str, str], cable: Cable) -> None:
    """Rank 0's address and port, the interfaces of each host, and a value that ssh's shell would act on."""
    odd = "$(touch pwned) `x` 'y'"
    with ssh_servers(launch.folder / "ssh", [[each] for each in ADDRESSES], cable.prefixes()) as client:
        lines = f"hosts: [{', '.join(ADDRESSES)}]\nssh_options: {json.dumps(client)}\n"
        profile = f"backend: mpi\nmpi: {mpi.pop('mpi')}\n{ROOT_MAY}{lines}"
        given = options(launch, profile, 3, "--nodes=2", f"--env=ODD={odd}", count=1)
        done = subprocess.run(
            [*cable.prefixes()[0], *launch.command(*given, *HOSTILE)], env=launch.environment(mpi),
            cwd=launch.folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    found = ranks(launch.run)
    assert [(each["rank"], each["local_rank"], each["world_size"]) for each in found] == [
        (0, 0, 2),
        (1, 0, 2),
    ]
    assert {(each["address"], each["port"]) for each in found} == {(ADDRESSES[0], found[0]["port"])}
    assert [each["environment"]["GLOO_SOCKET_IFNAME"] for each in found] == ["cable0", "cable1"]
    assert {each["environment"]["ODD"] for each in found} == {odd}
    assert [tuple(each["arguments"]) for each in found] == [HOSTILE, HOSTILE]
    assert not list(launch.folder.rglob("pwned"))
