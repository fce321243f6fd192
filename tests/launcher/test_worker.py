"""Which interface a process takes on its node, and its scratch folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atomas_launcher import worker
from atomas_launcher.errors import LaunchError
from atomas_launcher.worker import Interface, choose_interface, interfaces, network_environment
from tests.launcher.conftest import ROOT

LOOPBACK = Interface(name="lo", address="127.0.0.1", is_fast=False)
ETHERNET = Interface(name="eth0", address="10.0.0.7", is_fast=False)
SECOND = Interface(name="eth1", address="10.1.0.7", is_fast=False)
INFINIBAND = Interface(name="ib0", address="10.9.0.7", is_fast=True)


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Host -> this host's address on the way there; the default route goes by eth0."""
    known = {"198.51.100.1": ETHERNET.address, "n1": SECOND.address, "own-name": "127.0.0.1"}
    monkeypatch.setattr(worker, "_address_towards", known.get)
    return known


def choose(
    found: list[Interface], wanted: tuple[str, ...] = (), host: str = "n1", one: bool = False
) -> str | None:
    return choose_interface(found, wanted, host, is_one_host=one)


@pytest.mark.usefixtures("routes")
def test_choice() -> None:
    everything = [LOOPBACK, ETHERNET, SECOND, INFINIBAND]
    assert choose(everything) == "ib0"
    assert choose(everything, one=True) == "lo"
    assert choose(everything[:3]) == "eth1", "the one that leads to rank 0's host"
    assert choose(everything[:3], host="nobody-knows-it") == "eth0", "the default route's"
    assert choose(everything[:3], host="own-name") == "eth0", "a host may know its own name as loopback"
    assert choose([LOOPBACK], host="nobody-knows-it") is None


@pytest.mark.usefixtures("routes")
def test_wanted_ones_must_be_up() -> None:
    assert choose([LOOPBACK, ETHERNET, INFINIBAND], ("ib1", "eth0", "ib0")) == "eth0"
    with pytest.raises(
        LaunchError, match=r"no interface of ib1, ib2 is up with an address here; these are: lo, eth0"
    ):
        choose([LOOPBACK, ETHERNET], ("ib1", "ib2"))


def test_given_variables_stay() -> None:
    given = {"NCCL_SOCKET_IFNAME": "ib7"}
    assert network_environment(given, ("lo",), "127.0.0.1", is_one_host=True) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert network_environment({}, ("lo",), "127.0.0.1", is_one_host=True)["NCCL_SOCKET_IFNAME"] == "=lo"


def test_this_host_has_a_loopback() -> None:
    assert ("lo", "127.0.0.1") in {(each.name, each.address) for each in interfaces()}


def run(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "atomas_launcher.worker", *arguments], capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "launcher"), **environ},
    )  # fmt: skip


def test_a_process_becomes_its_command(tmp_path: Path) -> None:
    script = 'echo "$GLOO_SOCKET_IFNAME $TMPDIR $TRITON_CACHE_DIR $1"'
    done = run("--scratch", f"{tmp_path}/$JOB", "--", "sh", "-c", script, "sh", "--x=$JOB", JOB="7")
    assert done.stdout == f"lo {tmp_path}/7 {tmp_path}/7/triton --x=$JOB\n", done.stderr
    assert (tmp_path / "7").is_dir()
    assert run("--", "sh", "-c", "exit 75").returncode == 75


def test_mistakes_name_the_host() -> None:
    done = run("--scratch", "/tmp/$NOWHERE", "--", "true")
    assert done.returncode == 2
    assert "scratch /tmp/$NOWHERE: a variable in it is not set here" in done.stderr
    done = run("--interfaces", "ib7", "--", "true")
    assert done.returncode == 2
    assert "no interface of ib7 is up" in done.stderr
    done = run("--", "true", RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "LOCAL_RANK is not set" in done.stderr
