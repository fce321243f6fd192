"""`atomas launch` without a scheduler, for real: processes of this host, mpirun, torchrun and deepspeed over ssh."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from atomas_launcher import runner
from atomas_launcher.job import Command
from tests.launcher.conftest import HOSTILE, Launch
from tests.launcher.ssh_hosts import PROGRAMS, ssh_servers


def ranks(run: Path) -> list[dict[str, Any]]:
    """What each rank found, by rank."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in run.glob("rank_*.json")]
    return sorted(found, key=lambda each: each["rank"])


def until(condition: Callable[[], bool], process: "subprocess.Popen[str] | None" = None) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@contextlib.contextmanager
def started(
    launch: Launch, *options: str, environ: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """A launch that is left running; it and what it started end with the block."""
    process = subprocess.Popen(
        launch.command(*options), cwd=launch.folder, env=launch.environment(environ), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=120)


def options(launch: Launch, profile: str, steps: int, *more: str, count: int = 2) -> list[str]:
    return [
        "--cluster", str(launch.profile(profile)), f"--gpus-per-node={count}", f"--run-directory={launch.run}",
        *more, "--", "train", str(launch.run), str(steps),
    ]  # fmt: skip


def test_local(launch: Launch) -> None:
    output = launch(*options(launch, "backend: local\n", 3, "--env=ODD=$(touch pwned)"), *HOSTILE)
    assert "local: 1 hosts x 2 processes = 2 ranks" in output
    found = ranks(launch.run)
    assert [(each["rank"], each["local_rank"], each["world_size"]) for each in found] == [
        (0, 0, 2),
        (1, 1, 2),
    ]
    assert {each["environment"]["GLOO_SOCKET_IFNAME"] for each in found} == {"lo"}
    assert {each["environment"]["ODD"] for each in found} == {"$(touch pwned)"}
    assert [tuple(each["arguments"]) for each in found] == [HOSTILE, HOSTILE]
    assert not list(launch.folder.rglob("pwned"))
    status = launch("status")
    assert "ended with exit code 0 (done)" in status
    assert "attempt 1, step 3" in status


def test_local_hands_a_signal_on_to_every_rank(launch: Launch) -> None:
    with started(launch, *options(launch, "", 1000)) as process:
        until(lambda: (launch.run / "step_1").exists() and (launch.run / "step_0").exists(), process)
        assert "running, process" in launch("status", "mine")
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "rank 0 saved" in output
    assert "rank 1 saved" in output
    assert "exit code 75 (saved; start it again to continue)" in launch("status", "mine")


def test_what_nohup_starts_outlives_the_terminal() -> None:
    told: list[tuple[int, bool]] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command = Command(
            arguments=(sys.executable, "-c", "import os, signal; os.kill(os.getppid(), signal.SIGHUP)")
        )
        told.append(runner.run_together([command]))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert told == [(0, False)]


def test_cancel_makes_a_kill_file_that_the_next_start_names(launch: Launch) -> None:
    with started(launch, *options(launch, "", 1000)) as process:
        until(lambda: (launch.run / "step_1").exists() and (launch.run / "step_0").exists(), process)
        assert "made" in launch("cancel", "mine")
        process.communicate(timeout=120)
    assert process.returncode == 75
    assert "KILL exists, so the run would stop at once" in launch(*options(launch, "", 1000), code=2)
    assert "has written nothing" in launch("logs", "mine", code=2)
    log = launch.run / "attempts" / "1" / "rank_0001.log"
    log.write_text("".join(f"line {number}\n" for number in range(9)), encoding="utf-8")
    assert launch("logs", "mine", "--rank=1", "--lines=2") == f"==> {log} <==\nline 7\nline 8\n"


def test_a_rank_that_dies_ends_the_others(launch: Launch) -> None:
    with started(launch, *options(launch, "", 1000)) as process:
        until(lambda: (launch.run / "step_1").exists() and (launch.run / "step_0").exists(), process)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
        )
        os.kill(int(children.stdout.split()[1]), signal.SIGKILL)
        process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL


def test_without_a_program_the_way_out_is_named(launch: Launch) -> None:
    output = launch("--backend=pbs", "--", "train", code=2)
    assert "there is no qsub on this host; try --dry-run, or another --backend" in output


@pytest.mark.slow
def test_torchrun_hands_a_signal_on(launch: Launch) -> None:
    """Without our variables SIGUSR1 would kill the agent and leave its workers running."""
    with started(launch, *options(launch, "backend: torchrun\n", 1000)) as process:
        until(lambda: (launch.run / "step_1").exists() and (launch.run / "step_0").exists(), process)
        process.send_signal(signal.SIGUSR1)
        output, errors = process.communicate(timeout=120)
    assert "rank 0 saved" in output + errors
    assert "rank 1 saved" in output + errors
    assert process.returncode != 0  # torchrun's own; the run itself ended with 75
    assert {each["launcher"] for each in ranks(launch.run)} == {"torchrun"}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[str]:
    """Lines of a profile with two hosts, which are two addresses of one sshd."""
    missing = [
        name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} on this host")
    with ssh_servers(tmp_path / "ssh", [("127.0.0.1", "127.0.0.2")]) as client:
        yield f"hosts: [127.0.0.1, 127.0.0.2]\nssh_options: {json.dumps(client)}\n"


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_torchrun_over_ssh(launch: Launch, hosts: str, rendezvous: str) -> None:
    profile = f"backend: torchrun\nrendezvous: {rendezvous}\n{hosts}"
    launch(*options(launch, profile, 3, "--nodes=2", "--env=ODD=$(touch pwned)", count=1), *HOSTILE)
    found = ranks(launch.run)
    assert [(each["rank"], each["local_rank"], each["world_size"]) for each in found] == [
        (0, 0, 2),
        (1, 0, 2),
    ]
    assert {each["environment"]["ODD"] for each in found} == {"$(touch pwned)"}
    assert [tuple(each["arguments"]) for each in found] == [HOSTILE, HOSTILE]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ranks_over_ssh_have_time_to_save(launch: Launch, hosts: str, number: int) -> None:
    """The client of ssh hands on nothing but its own end, which the other side hears as SIGHUP."""
    profile = f"backend: torchrun\nrendezvous: static\n{hosts}"
    given = options(launch, profile, 1000, "--nodes=2", "--env=STAND_IN_SAVES=2", count=1)
    with started(launch, *given) as process:
        until(lambda: (launch.run / "step_1").exists() and (launch.run / "step_0").exists(), process)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode != 0
    until(lambda: all((launch.run / f"saved_{rank}").exists() for rank in (0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("backend", ["local", "torchrun", "deepspeed"])
def test_ranks_have_time_to_save(launch: Launch, backend: str, number: int) -> None:
    with started(
        launch, *options(launch, f"backend: {backend}\n", 1000, "--env=STAND_IN_SAVES=3")
    ) as process:
        until(lambda: (launch.run / "step_1").exists() and (launch.run / "step_0").exists(), process)
        process.send_signal(number)
        output, errors = process.communicate(timeout=100)
    assert "rank 0 saved" in output + errors
    assert "rank 1 saved" in output + errors
    assert process.returncode == 75 or (backend != "local" and process.returncode != 0)
    assert not (launch.run / "attempts" / "2").exists()  # although torchrun and deepspeed end with a failure


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ranks_over_pdsh_have_time_to_save(launch: Launch, hosts: str, number: int) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("needs pdsh on this host")
    given = options(
        launch, f"backend: deepspeed\n{hosts}", 1000, "--nodes=2", "--env=STAND_IN_SAVES=3", count=1
    )
    with started(launch, *given) as process:
        until(lambda: (launch.run / "step_1").exists() and (launch.run / "step_0").exists(), process)
        process.send_signal(number)
        process.communicate(timeout=100)
    until(lambda: all((launch.run / f"saved_{rank}").exists() for rank in (0, 1)))


@pytest.mark.slow
def test_deepspeed_over_pdsh(launch: Launch, hosts: str) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("needs pdsh on this host")
    profile = f"backend: deepspeed\n{hosts}"
    odd = "$(touch pwned) `x` \"y\" 'z'"
    launch(*options(launch, profile, 3, "--nodes=2", f"--env=ODD={odd}", count=1), *HOSTILE)
    found = ranks(launch.run)
    assert [(each["rank"], each["local_rank"], each["world_size"]) for each in found] == [
        (0, 0, 2),
        (1, 0, 2),
    ]
    assert {each["environment"]["ODD"] for each in found} == {odd}
    assert [tuple(each["arguments"]) for each in found] == [HOSTILE, HOSTILE]
    assert not list(launch.folder.rglob("pwned"))


def test_nothing_heavy_is_imported(launch: Launch) -> None:
    """A login node has neither torch nor atomas."""
    code = (
        "import sys; import atomas_launcher.cli, atomas_launcher.worker;"
        "assert not {'torch', 'atomas', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=launch.environment())
