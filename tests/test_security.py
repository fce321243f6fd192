"""What an attacker might hope for: archives that write where they like, pickles, ports that anyone reaches."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.jobs import free_port

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("atomas", "kernels", "launcher") for path in (ROOT / folder).rglob("*.py")]
UNPACKING = {"extractall", "extract", "unpack_archive"}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file, by the dotted name of what is called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def test_nothing_unpacks_an_archive() -> None:
    """Members are read as streams; a member named ../x or /x can become no path."""
    assert len(SOURCES) > 100
    for path in SOURCES:
        for name, _ in calls(path):
            assert name.rpartition(".")[2] not in UNPACKING, f"{path}: {name}"


def test_nothing_reads_a_pickle() -> None:
    for path in SOURCES:
        for name, call in calls(path):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name == "torch.load":
                assert options.get("weights_only") == "True", f"{path}:{call.lineno}"
            if name in ("np.load", "numpy.load"):  # its default is no pickle
                assert options.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"
            assert name not in ("pickle.load", "pickle.loads", "yaml.load", "eval", "exec"), (
                f"{path}:{call.lineno}"
            )


def test_no_command_goes_through_a_shell() -> None:
    for path in SOURCES:
        for name, call in calls(path):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert options.get("shell", "False") == "False", f"{path}:{call.lineno}"
            assert name not in ("os.system", "os.popen"), f"{path}:{call.lineno}"


PROGRAM = """
import json, os, sys
from datetime import timedelta
from pathlib import Path
from atomas.config import RunConfig
from atomas.distributed.process_group import process_group
from atomas.distributed.watchdog import watch
import torch.distributed as dist
with process_group(RunConfig(device="cpu", threads=1)) as (placement, _), watch(RunConfig(), placement):
    dist.barrier()
    own = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    addresses = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in own:  # LISTEN
                addresses.append(words[1].partition(":")[0])
    Path(sys.argv[1]).write_text(json.dumps(addresses))
    dist.barrier()
"""
LOOPBACK = "0100007F"


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
def test_a_run_on_one_host_listens_on_loopback(tmp_path: Path) -> None:
    """As `atomas launch` starts it: torch's store, the watchdog's and gloo's own."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environ |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path / f"{rank}")],
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    found = [json.loads((tmp_path / f"{rank}").read_text()) for rank in range(2)]
    assert len(found[0]) >= 2, "rank 0 holds two stores"
    assert {address for each in found for address in each} == {LOOPBACK}
