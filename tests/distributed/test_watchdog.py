"""The watchdog: its judgement on boards made by hand, and small real processes that hang."""

import contextlib
import json
import os
import re
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from atomas.config import RunConfig
from atomas.distributed.collectives import all_reduce
from atomas.distributed.flight_recorder import FlightRecorder, raised_in
from atomas.distributed.watchdog import LOST_RANK_EXIT_CODE, Seen, Status, judge, watch
from atomas.phases import Collective, communication, observed_by, phase
from atomas_launcher.placement import Placement


def seen(silent_seconds: float = 0.5, **changes: object) -> Seen:
    status = {
        "beat": 9, "state": "running", "host": "n1", "place": "step 12, all_reduce of vote", "step": 12,
        "collectives": 40, "communicates": True, "seconds": 1.0,
    }  # fmt: skip
    return Seen(status=Status(**{**status, **changes}), silent_seconds=silent_seconds)  # type: ignore[arg-type]


def verdict(board: dict[int, Seen]):  # type: ignore[no-untyped-def]
    return judge(board, timeout=60, silence=30)


def test_nothing_is_wrong_within_the_limits() -> None:
    evaluating = seen(place="step 12, evaluation", communicates=False, seconds=0.0, collectives=39)
    assert verdict({0: evaluating, 1: seen(seconds=59), 2: seen(silent_seconds=29)}) is None
    assert verdict({0: seen(), 1: seen(state="finished", silent_seconds=500)}) is None


def test_a_silent_rank_is_named() -> None:
    found = verdict({0: seen(), 1: seen(31, host="n2", place="step 12, all_gather of tokens of level 0")})
    assert found.guilty == (1,)
    assert found.message == (
        "rank 1 (n2) has not been seen for 31 s; it was last heard of in step 12, all_gather of tokens of level 0"
    )


def test_a_broken_connection_shortens_the_wait() -> None:
    lost = seen(state="lost", error="RuntimeError: connection closed")
    assert verdict({0: seen(), 1: lost, 2: seen(silent_seconds=2)}) is None
    assert verdict({0: seen(), 1: lost, 2: seen(silent_seconds=4)}).guilty == (2,)
    network = verdict({0: seen(), 1: seen(state="lost", seconds=11, error="RuntimeError: reset")})
    assert network.guilty == ()
    assert "every rank is alive" in network.message
    assert "RuntimeError: reset" in network.message


def test_a_failure_comes_first() -> None:
    failed = seen(state="failed", error="ValueError: broken", place="step 12, data", silent_seconds=99)
    found = verdict({0: seen(silent_seconds=99), 1: failed})
    assert found.message == "rank 1 (n1) failed in step 12, data: ValueError: broken"
    assert found.grace


def test_a_stop_that_is_overdue_ends_all_as_if_they_had_stopped() -> None:
    late = seen(state="overdue", error="asked to stop, and the grace time of 9 s is over", silent_seconds=99)
    found = verdict({0: seen(silent_seconds=99), 1: late})
    assert found.message == (
        "rank 1 (n1) was asked to stop, and the grace time of 9 s is over in step 12, all_reduce of vote"
    )
    assert (found.guilty, found.resume, found.grace) == ((1,), True, False)


def test_who_stayed_behind_is_guilty_not_who_waits() -> None:
    behind = seen(place="step 12, encoder", communicates=False, seconds=0.0, collectives=39)
    assert verdict({0: seen(seconds=61), 1: behind, 2: seen(seconds=61)}).guilty == (1,)
    # DeepSpeed's collectives are not counted: the same number, but one is still loading
    loading = seen(place="step 12, data", communicates=False, seconds=61.0)
    assert verdict({0: seen(place="step 12, backward", seconds=60.5), 1: loading}).guilty == (1,)
    everywhere = verdict({0: seen(seconds=61), 1: seen(seconds=61)})
    assert everywhere.guilty == ()
    assert everywhere.message.startswith("no rank goes on for 61 s: rank 0 (n1) is in step 12, all_reduce")


def test_the_flight_recorder_keeps_the_last_steps(tmp_path: Path) -> None:
    recorder = FlightRecorder(rank=3, keep=2)
    call = Collective(kind="all_reduce", what="vote", payload_bytes=8)
    with observed_by(recorder):
        for step in (1, 2, 3):
            recorder.begin_step(step)
            with phase("data"):
                time.sleep(0.01)
            with phase("backward"), communication(call):
                time.sleep(0.3)
        error = KeyError()
        with contextlib.suppress(KeyError), phase("optimizer"), communication(call):
            assert recorder.waiting_seconds(("optimizer",)) is not None
            path = recorder.dump(tmp_path, "because")
            raise error
    assert raised_in(error) == "step 3, all_reduce of vote"
    assert recorder.place() == "step 3"
    flight = json.loads(path.read_text())
    assert path.name == "flight_rank_0003.json"
    assert [step["step"] for step in flight["steps"]] == [2, 3]
    assert (flight["reason"], flight["place"]) == ("because", "step 3, all_reduce of vote")
    before, last = flight["steps"]
    assert before["phases"]["data"] >= 0.01
    assert before["phases"]["communication"] >= 0.3 > before["phases"]["backward"]  # exclusive time
    assert [each["number"] for each in last["collectives"]] == [3, 4]
    assert last["collectives"][0]["seconds"] >= 0.3
    assert last["collectives"][1]["seconds"] is None


def _rank(rank: int, folder: str) -> None:
    """All take longer than the limit where nobody waits; then rank 1 does where the others wait for it."""
    log = Path(folder) / f"log_{rank}"
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 2)
    os.environ.update(MASTER_ADDR="127.0.0.1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    placement = Placement(
        rank=rank, world_size=3, local_rank=rank, local_world_size=3, address="127.0.0.1", port=0,
        launcher="torchrun",
    )  # fmt: skip
    limits = RunConfig(collective_timeout_seconds=8, silence_timeout_seconds=8)
    with watch(limits, placement) as watchdog:
        watchdog.write_flight_to(Path(folder))
        for step in range(1, 10):
            watchdog.begin_step(step)
            if step == 2 or (step == 4 and rank == 1):
                with phase("evaluation"):
                    time.sleep(9 if step == 2 else 600)
            all_reduce(torch.ones(1), "vote")
    raise AssertionError("the watchdog lets nobody come here")


def test_a_hanging_rank_ends_all_of_them_with_one_line(tmp_path: Path) -> None:
    started = time.monotonic()
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=200)
    assert time.monotonic() - started < 200
    assert [process.exitcode for process in ranks] == [LOST_RANK_EXIT_CODE] * 3
    lines = (tmp_path / "log_0").read_text().splitlines()
    assert len(lines) == 1
    waited = re.search(r"is in step 4, evaluation, and the others have waited (\d+) s", lines[0])
    assert waited
    assert int(waited[1]) >= 8
    assert lines[0].startswith("rank 1 (")
    assert lines[0].endswith("rank 0 was in step 4, all_reduce of vote")
    assert (tmp_path / "log_2").read_text() == ""  # on the console once
    flights = [json.loads((tmp_path / f"flight_rank_{rank:04d}.json").read_text()) for rank in range(3)]
    assert [flight["collectives"] for flight in flights] == [4, 3, 4]
    assert [flight["reason"].startswith("rank 1 (") for flight in flights] == [True] * 3
