"""Two hosts on this machine: two network namespaces with a cable between them."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from atomas.data.demo import build_demo_corpus
from atomas.distributed.watchdog import LOST_RANK_EXIT_CODE
from tests.distributed.cable import ADDRESSES, Cable
from tests.distributed.jobs import SILENCE, SLACK, TIMEOUT, Bench, Job
from tests.training.conftest import losses

pytestmark = pytest.mark.slow

PLACES = [
    {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": f"cable{rank}"} for rank in range(2)
]


@pytest.fixture
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs ip (iproute2) and unshare (util-linux)")
    cable = Cable()
    try:
        cable.build()
    except subprocess.CalledProcessError as error:
        cable.remove()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    yield cable
    cable.remove()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("hosts")
    build_demo_corpus(folder / "corpus", pairs=240, seed=3, workers=1)
    return Bench(folder)


@contextmanager
def on_two_hosts(bench: Bench, cable: Cable, name: str, *options: str) -> Iterator[Job]:
    with bench.job(
        name, *options, prefixes=cable.prefixes(), places=PLACES, environ={"MASTER_ADDR": ADDRESSES[0]}
    ) as job:
        yield job


def test_two_hosts_train_as_one_process_does(bench: Bench, cable: Cable) -> None:
    same = "--model.dropout_rate=0"  # each rank drops others
    with on_two_hosts(bench, cable, "two_hosts", same) as job:
        job.wait()
        assert job.codes() == [0, 0], job.errors()
    assert losses(job.run) == pytest.approx(bench.train("alone", same, ranks=1), rel=1e-5)


def test_a_cut_link_ends_both_sides(bench: Bench, cable: Cable) -> None:
    with on_two_hosts(bench, cable, "cut", "--training.max_steps=5000") as job:
        _wait_for_steps(job, 3)
        cable.cut()
        cut = time.monotonic()
        job.wait(seconds=TIMEOUT + SLACK)
        assert time.monotonic() - cut < SILENCE + SLACK
        assert job.codes() == [LOST_RANK_EXIT_CODE] * 2, job.errors()
    for rank in range(2):
        other = 1 - rank
        assert f"rank {other} (n{other}) has not been seen for " in job.last_line(rank)
        assert f"; rank {rank} was in step " in job.last_line(rank)
        assert "CRITICAL" in job.last_line(rank)  # neither knows that the other one speaks
        assert job.flight(rank)["host"] == f"n{rank}"


def _wait_for_steps(job: Job, steps: int) -> None:
    metrics: Path = job.run / "attempts/1/metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline, job.errors()
        assert job.codes() == [None, None], job.errors()
        time.sleep(0.1)
