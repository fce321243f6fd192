"""Three hosts on this machine, network namespaces at one switch; the cable of one of them is slow."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

COUNT, SLOW = 3, 2
"""Hosts, and which of them has the slow cable."""


def run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, timeout=30)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    if any(shutil.which(program) is None for program in ("ip", "tc", "unshare")):
        pytest.skip("needs ip and tc (iproute2) and unshare (util-linux)")
    names = [f"doctor{os.getpid()}n{number}" for number in range(COUNT)]
    switch = f"doctor{os.getpid()}switch"
    try:
        run("ip", "netns", "add", switch)
        run("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "switch", "up")
        for number, name in enumerate(names):
            run("ip", "netns", "add", name)
            run(
                "ip",
                "-n",
                name,
                "link",
                "add",
                "cable",
                "type",
                "veth",
                "peer",
                "name",
                f"p{number}",
                "netns",
                switch,
            )
            run("ip", "-n", switch, "link", "set", f"p{number}", "master", "switch", "up")
            run("ip", "-n", name, "address", "add", f"10.213.78.{number + 1}/24", "dev", "cable")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", "cable", "up")
        shape = ("root", "tbf", "rate", "200mbit", "burst", "128kb", "latency", "100ms")
        run("tc", "-n", names[SLOW], "qdisc", "add", "dev", "cable", *shape)
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    finally:
        for name in (*names, switch):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=30)


def test_the_slow_node_is_named(hosts: list[str], tmp_path: Path) -> None:
    """The ranks find their interface by themselves: each has only its cable and loopback."""
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("GLOO_", "NCCL_", "SLURM_", "OMPI_"))}
    python = [sys.executable, "-m"]
    doctor = ["atomas_launcher.worker", "--", *python, "atomas", "doctor", "--distributed", "--json"]
    processes = []
    for rank, host in enumerate(hosts):
        environ = {
            **clean, "RANK": str(rank), "WORLD_SIZE": str(COUNT), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.213.78.1", "MASTER_PORT": "29411", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        named = ["unshare", "--uts", "sh", "-c", f'hostname host{rank}; exec "$@"', "sh"]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *named, *python, *doctor, "--folder", str(tmp_path / "runs")],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    checks = {check["name"]: check for check in json.loads(outputs[0][0])["checks"]}
    assert checks["rendezvous"]["message"] == "3 ranks met: host0 x 1, host1 x 1, host2 x 1"
    assert checks["all-reduce"]["status"] == "ok"
    assert checks["links"]["status"] == "warning"
    assert checks["links"]["message"].startswith(f"slow: host{SLOW} (0.0"), checks["links"]["message"]
    assert checks["shared folder"]["status"] == "ok"
    # in these namespaces the hosts' names lead nowhere, which is an error of each host
    try:
        socket.gethostbyname("host0")
        is_known = True
    except OSError:
        is_known = False
    assert {process.returncode for process in processes} == ({0} if is_known else {1})
    assert [stdout for stdout, _ in outputs[1:]] == ["", ""], "only rank 0 speaks"
