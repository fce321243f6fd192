"""Checks of one node: each on a node that is well and on one that is not."""

import json
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from atomas.data.demo import build_demo_corpus
from atomas.diagnosis import host
from atomas.diagnosis.result import CheckResult, as_json, attempt, is_go, merge
from atomas_launcher.worker import Interface

Space = namedtuple("Space", "f_bavail f_frsize f_files f_favail")


def test_a_folder_that_can_be_written(tmp_path: Path) -> None:
    result = host.check_folder(tmp_path / "new")
    assert result.status in ("ok", "warning")  # a busy machine may be slow
    assert "MB/s written to disk" in result.message
    assert not list((tmp_path / "new").iterdir()), "nothing is left behind"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = host.check_folder(tmp_path / "file" / "runs")
    assert result.status == "error"
    assert "--folder" in result.remedy


def test_a_slow_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.os, "fsync", lambda _file: time.sleep(0.7))
    result = host.check_folder(tmp_path)
    assert result.status == "warning"
    assert "choose a faster filesystem" in result.remedy


@pytest.mark.parametrize(
    ("free", "inodes", "status"),
    [(500e9, 1e6, "ok"), (5e9, 1e6, "warning"), (500e9, 50, "warning"), (1e8, 1e6, "error")],
)
def test_free_space(free: float, inodes: float, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.os, "statvfs", lambda _path: Space(free, 1, 1e6, inodes))
    assert host.check_space(Path("runs")).status == status


def test_a_filesystem_that_does_not_count_inodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.os, "statvfs", lambda _path: Space(1e12, 1, 0, 0))
    result = host.check_space(Path("runs"))
    assert result.status == "ok"
    assert "uncounted inodes" in result.message


def test_shared_memory_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.os, "statvfs", lambda _path: Space(64 * 2**20, 1, 0, 0))
    result = host.check_shared_memory()
    assert result.status == "warning"
    assert "--shm-size" in result.remedy


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.resource, "getrlimit", lambda _which: (256, 256))
    result = host.check_limits()
    assert result.status == "warning"
    assert "ulimit -n" in result.remedy


def test_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr(
        host, "interfaces", lambda: [Interface(name="eth0", address="10.0.0.7", is_fast=False)]
    )
    assert host.check_network().message == "eth0 10.0.0.7; localhost is 127.0.0.1"
    monkeypatch.setattr(host, "interfaces", list)
    assert host.check_network().status == "warning"
    monkeypatch.setattr(host.socket, "gethostname", lambda: "no-such-host.invalid")
    assert host.check_network().status == "error"


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with host.socket.create_server(("", 0)) as taken:
        monkeypatch.setattr(host, "port_of", lambda _name: taken.getsockname()[1])
        result = host.check_port()
    assert result.status == "warning"
    assert "MASTER_PORT" in result.remedy


def test_outgoing_ports_that_are_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_lowest_outgoing_port", lambda: 1024)
    assert "ip_local_port_range" in host.check_port().remedy


def test_what_an_installed_package_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of torch asks for its own triton, which a constraints file of a CPU build may have replaced."""
    declared = ["triton==3.6.0; platform_system == 'Linux'", "tensorrt>=10; extra == 'opt'", "none-such>=1"]
    versions = {"triton": "3.9.0"}
    monkeypatch.setattr(host.importlib.metadata, "requires", lambda _package: declared)
    monkeypatch.setattr(host, "_version", versions.get)
    assert host.unmet("torch") == [
        "triton 3.9.0 is not ==3.6.0, as torch needs",
        "none-such is missing, which torch needs",
    ]
    versions |= {"triton": "3.6.0", "none-such": "2"}
    assert host.unmet("torch") == []


def test_pairs_that_are_known_to_be_bad() -> None:
    (told,) = host.known_bad({"torch": "2.13.0+cpu", "deepspeed": "0.19.5"})
    assert told.startswith("torch 2.13.0+cpu with deepspeed 0.19.5: DeepSpeed's operators do not build")
    assert not host.known_bad({"torch": "2.13.0+cpu", "deepspeed": "0.19.8"})
    assert not host.known_bad({"torch": "2.11.0", "deepspeed": "0.19.5"})
    assert not host.known_bad({"torch": "2.13.0"})


def test_variables_that_make_a_run_slow_or_wrong() -> None:
    assert host.check_environment({"PATH": "/bin", "NCCL_IB_DISABLE": "0"}).status == "ok"
    result = host.check_environment({"TRITON_INTERPRET": "1", "CUDA_LAUNCH_BLOCKING": "1"})
    assert result.status == "warning"
    assert "TRITON_INTERPRET=1" in result.message
    assert "CUDA_LAUNCH_BLOCKING=1" in result.message


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host.importlib.metadata,
        "requires",
        lambda _name: ["torch<2.15,>=99", "no-such-package", "x; extra == 'dev'"],
    )
    result = host.check_versions()
    assert result.status == "error"
    assert (
        "is not <2.15,>=99, as atomas needs; no-such-package is missing, which atomas needs" in result.message
    )


def test_a_corpus(tmp_path: Path) -> None:
    assert host.check_corpus(None).status == "skipped"
    assert host.check_corpus(tmp_path).status == "error"
    build_demo_corpus(tmp_path / "corpus", pairs=60, seed=1, workers=1)
    assert "train" in host.check_corpus(tmp_path / "corpus").message
    shard = next((tmp_path / "corpus").rglob("*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    result = host.check_corpus(tmp_path / "corpus")
    assert result.status == "error"
    assert shard.name in result.message


def test_a_check_that_fails_is_an_error_of_that_check() -> None:
    def broken() -> CheckResult:
        raise ZeroDivisionError("by zero\nand more")

    result = attempt("disk", broken)
    assert (result.name, result.status) == ("disk", "error")
    assert result.message == "the check itself failed: ZeroDivisionError: by zero"


def result(status: str, message: str) -> CheckResult:
    return CheckResult(name="disk", status=status, message=message)  # type: ignore[arg-type]


def test_nodes_are_put_together() -> None:
    same, other, worst = result("ok", "fine"), result("ok", "fine too"), result("error", "full")
    assert merge({"n1": [same], "n2": [same]}) == [same]
    assert merge({"n1": [same], "n2": [other]})[0].message == "all 2 nodes: fine"
    (found,) = merge({"n1": [same], "n2": [worst], "n3": [same]})
    assert (found.status, found.message) == ("error", "n2: full")


def test_json_and_verdict() -> None:
    results = [result("ok", "fine"), result("warning", "slow"), result("skipped", "not here")]
    assert is_go(results)
    assert not is_go([*results, result("error", "full")])
    found = json.loads(as_json(results))
    assert found["go"] is True
    assert found["checks"][1] == {"name": "disk", "status": "warning", "message": "slow", "remedy": ""}


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """One process that is well, and one whose run folder is a file."""
    (tmp_path / "file").touch()
    for folder, code in ((tmp_path / "runs", 0), (tmp_path / "file" / "runs", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "atomas", "doctor", "--json", "--folder", str(folder)], capture_output=True,
            text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        found = {check["name"]: check["status"] for check in json.loads(done.stdout)["checks"]}
        assert (found["run folder"] == "error") == bool(code)
        assert found["native kernels, CPU"] in ("ok", "warning")
