"""A rank that dies, fails or hangs ends the run on every rank, in bounded time, with one line that names it.

A process that waits inside gloo or NCCL cannot be interrupted, so threads beside it do the work. Once a second each
rank posts where it is to a store in rank 0's process and reads what it must know: rank 0 reads every rank and posts a
verdict when one is lost, the others read the verdict and rank 0's own state. So W ranks cost 3 W small messages a
second. One thread speaks with the store, and may hang there when the link is cut; another judges, and never does.

No clock is compared with another host's: a rank is silent while its counter does not change, by the reader's own
clock, and that clock stands still while the reader itself is stopped.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from atomas.config import RunConfig
from atomas.distributed.agreement import from_rank_zero
from atomas.distributed.flight_recorder import COMMUNICATING, FlightRecorder, raised_in
from atomas.distributed.rank_zero_store import connect, listen
from atomas.errors import AtomasError
from atomas.phases import observed_by
from atomas_launcher.placement import Placement
from atomas_launcher.process import RESUME_EXIT_CODE

logger = logging.getLogger("atomas")

LOST_RANK_EXIT_CODE = 76
"""Another rank died, failed or hung, or the network between them did: nothing is wrong with this one."""

_WATCHED = (*COMMUNICATING, "data")
"""Phases that must end within the time limit. The others may take long, as long as nobody waits for the rank."""
_INTERVAL = 1.0
"""Seconds between two exchanges with the store."""
_SILENCE_AFTER_A_LOSS = 3.5
"""Once a connection has broken, a rank that is silent for so long is the one at its other end."""
_SEARCH_AFTER_A_LOSS = 10.0
"""Nobody has fallen silent for so long after a connection broke: then it is the network."""
_GRACE = 5.0
"""A rank whose peer has failed may fail by itself, with its own message, for so long: often all fail together."""
_LAST_WORDS = 3.0
"""The store, and what it says, outlives rank 0's end for so long."""
_LAST_RESORT = 20.0
"""A log or flight file that cannot be written (a hung file system) delays the end no longer than this."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a rank says of itself."""

    beat: int
    """Grows with every message"""
    state: Literal["running", "lost", "failed", "overdue", "finished"]
    """`lost`: a connection broke under it; `failed`: it ends with an error of its own; `overdue`: it was asked to stop
    and could not in time"""
    host: str
    place: str
    """Step, and phase or collective, for people"""
    step: int
    collectives: int
    """Collectives that it has begun"""
    communicates: bool
    """It is in a phase in which it may wait for others"""
    seconds: float
    """Since it entered the watched phase that it is in, or lost its connection; by its own clock"""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A rank's last words, and how long ago they were new."""

    status: Status
    silent_seconds: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why the run ends."""

    message: str
    guilty: tuple[int, ...]
    """Ranks that died, failed or stayed behind; none where it is the network"""
    grace: bool = False
    """Others may be about to fail by themselves"""
    resume: bool = False
    """The run was asked to stop: nothing is wrong"""


def judge(board: Mapping[int, Seen], *, timeout: float, silence: float) -> Verdict | None:
    """What is wrong with the ranks on the board, if anything.

    Args:
        board: what is known, by rank.
        timeout: seconds that a watched phase may take.
        silence: seconds without news after which a rank counts as dead or stopped.
    """
    overdue = {rank: seen.status for rank, seen in board.items() if seen.status.state == "overdue"}
    if overdue:
        told = (f"rank {r} ({s.host}) was {s.error} in {s.place}" for r, s in overdue.items())
        return Verdict(message="; ".join(told), guilty=tuple(overdue), resume=True)
    failed = {rank: seen.status for rank, seen in board.items() if seen.status.state == "failed"}
    if failed:
        told = (f"rank {r} ({s.host}) failed in {s.place}: {s.error}" for r, s in failed.items())
        return Verdict(message="; ".join(told), guilty=tuple(failed), grace=True)

    lost = {rank: seen.status for rank, seen in board.items() if seen.status.state == "lost"}
    allowed = min(silence, _SILENCE_AFTER_A_LOSS) if lost else silence
    silent = {
        rank: seen
        for rank, seen in board.items()
        if seen.status.state in ("running", "lost") and seen.silent_seconds > allowed
    }
    if silent:
        told = (
            f"rank {rank} ({seen.status.host}) has not been seen for {seen.silent_seconds:.0f} s; "
            f"it was last heard of in {seen.status.place}"
            for rank, seen in silent.items()
        )
        return Verdict(message="; ".join(told), guilty=tuple(silent))
    if any(status.seconds > _SEARCH_AFTER_A_LOSS for status in lost.values()):
        told = (f"rank {r} ({s.host}) in {s.place}: {s.error}" for r, s in lost.items())
        return Verdict(
            message=f"connections broke although every rank is alive: {'; '.join(told)}", guilty=()
        )
    return _judge_waiting(
        {rank: seen.status for rank, seen in board.items() if seen.status.state == "running"}, timeout
    )


def _judge_waiting(running: Mapping[int, Status], timeout: float) -> Verdict | None:
    """A phase took too long somewhere: guilty is not who waits longest, but who has not come as far as the others."""
    longest = max((status.seconds for status in running.values()), default=0.0)
    if longest <= timeout:
        return None
    least = min((status.step, status.collectives) for status in running.values())
    last = [rank for rank, status in running.items() if (status.step, status.collectives) == least]
    last = [rank for rank in last if not running[rank].communicates] or last
    where = "; ".join(f"rank {rank} ({running[rank].host}) is in {running[rank].place}" for rank in last)
    if len(last) == len(running):
        return Verdict(message=f"no rank goes on for {longest:.0f} s: {where}", guilty=())
    return Verdict(message=f"{where}, and the others have waited {longest:.0f} s", guilty=tuple(last))


@contextlib.contextmanager
def watch(run: RunConfig, placement: Placement) -> Iterator["Watchdog"]:
    """Watch all ranks during the block, which all enter and leave together. Collective.

    An error that leaves the block is told to the others. Where it is only a connection that broke, because another
    rank is gone, the process ends here with LOST_RANK_EXIT_CODE, after one line that says which.
    """
    watchdog = Watchdog(run, placement)
    with observed_by(watchdog.recorder):
        try:
            yield watchdog
        except BaseException as error:
            watchdog.fail(error)
            raise
        watchdog.finish()


class Watchdog:
    """One rank's threads, and its flight recorder. A single rank has the recorder alone."""

    def __init__(self, run: RunConfig, placement: Placement) -> None:
        self.recorder = FlightRecorder(rank=placement.rank)
        self._folder: Path | None = None
        self._rank, self._world_size = placement.rank, placement.world_size
        self._timeout = run.collective_timeout_seconds
        self._silence = min(run.silence_timeout_seconds, self._timeout)
        self._host = socket.gethostname()
        self._state: Literal["running", "lost", "failed", "overdue", "finished"] = "running"
        self._error = self._failed_in = ""
        self._lost_at = 0.0
        self._beat = 0
        self._clock = 0.0
        """Seconds that this process has run since the start"""
        self._seen: dict[int, tuple[Status, float]] = {}
        """Last status of each rank that is read, and the clock when it was new"""
        self._verdict: Verdict | None = None
        self._wake, self._stopped = threading.Event(), threading.Event()
        if self._world_size > 1:
            self._start(placement)

    def _start(self, placement: Placement) -> None:
        patience = timedelta(seconds=self._silence)
        address = placement.address
        if self._rank == 0:
            self._store = listen(placement, 0, patience)
        port = from_rank_zero(self._store.port if self._rank == 0 else None)
        if self._rank != 0:
            try:
                self._store = connect(placement, port, patience)
            except RuntimeError as error:
                raise AtomasError(
                    f"rank {self._rank} cannot reach the watchdog of rank 0 at {address}:{port}; "
                    f"processes of a job need free ports between their hosts: {error}"
                ) from None
        # keys of all ranks are there before anyone reads them
        self._store.set(_key(self._rank), self._status_text())
        if self._rank == 0:
            self._store.set("verdict", "")
        dist.barrier()
        self._peers = range(1, self._world_size) if self._rank == 0 else range(1)
        for rank in self._peers:
            self._read(rank, self._store.get(_key(rank)))
        self._threads = [
            threading.Thread(target=target, daemon=True, name=f"watchdog-{target.__name__}")
            for target in (self._exchange, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def write_flight_to(self, folder: Path) -> None:
        """Where the flight file goes, once the run's folder is known.

        Raises:
            AtomasError: the folder cannot be written.
        """
        try:
            self.recorder.make_room(folder)
        except OSError as error:
            raise AtomasError(f"{folder} cannot be written: {error}") from None
        self._folder = folder

    def begin_step(self, step: int) -> None:
        """What follows belongs to optimizer step `step`, counted from 1."""
        self.recorder.begin_step(step)

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends with `error`; where another one is the cause, end here and now."""
        self._failed_in = raised_in(error) or self.recorder.place()
        self._error = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if self._verdict is None:  # otherwise this error only follows from it
            lost = _is_lost_connection(error)
            self._dump(self._error, guilty=() if lost else (self._rank,), error=error)
        if self._world_size == 1:
            return
        if _is_lost_connection(error):
            self._lost_at = self._clock
            self._state = "lost"
            self._wake.set()
            threading.Event().wait(2 * _LAST_RESORT)  # the judge finds who is gone, and ends this process
        self._state = "failed"
        self._tell()
        if self._rank == 0:
            time.sleep(_LAST_WORDS)
        self._stop()

    def end_overdue(self, message: str) -> None:
        """End this process, and the others: it was asked to stop, and neither step nor checkpoint ended in time.

        Called by a thread beside the loop, which may hang in a collective.
        """
        self._begin_last_resort(RESUME_EXIT_CODE)
        self._error = message
        self._state = "overdue"
        told = f"rank {self._rank} ({self._host}) was {message} in {self.recorder.place()}"
        logger.critical("%s; the next start continues the newest checkpoint", told)
        self._dump(told, guilty=(self._rank,))
        if self._world_size > 1:
            self._tell()
            if self._rank == 0:
                time.sleep(_LAST_WORDS)
        self._leave(RESUME_EXIT_CODE)

    def finish(self) -> None:
        """This rank has come to its end. Rank 0, whose process holds the store, waits for the others."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self.recorder.give_room_back(self._folder)
        if self._world_size == 1:
            return
        self._state = "finished"
        deadline = self._clock + self._silence
        while self._rank == 0 and self._clock < deadline:
            if all(seen.status.state != "running" for rank, seen in self._board().items() if rank != 0):
                break
            self._wake.set()
            time.sleep(0.1)
        self._tell()
        self._stop()

    def _tell(self) -> None:
        """Wait until the present state has been posted, while the store answers."""
        beat, deadline = self._beat, time.monotonic() + _LAST_WORDS
        # the message in flight may still hold the state before
        while self._beat < beat + 2 and self._threads[0].is_alive() and time.monotonic() < deadline:
            self._wake.set()
            time.sleep(0.02)

    def _stop(self) -> None:
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=_LAST_WORDS)

    def _exchange(self) -> None:
        """Post and read, until the store is gone; what that means is for the judge to say."""
        keys = [*map(_key, self._peers), "verdict"]
        posted = False
        while not self._stopped.is_set():
            try:
                self._store.set(_key(self._rank), self._status_text())
                if self._rank == 0 and self._verdict is not None and not posted:
                    self._store.set("verdict", json.dumps(asdict(self._verdict)))
                    posted = True
                *texts, verdict = self._store.multi_get(keys)
            except RuntimeError:
                return
            for rank, text in zip(self._peers, texts, strict=True):
                self._read(rank, text)
            self._beat += 1
            if self._rank != 0:
                if verdict:
                    found = json.loads(verdict)
                    self._verdict = Verdict(**{**found, "guilty": tuple(found["guilty"])})
                if verdict or self._seen[0][0].state in ("failed", "overdue"):
                    return  # rank 0 is about to leave, and its store with it
            self._wake.wait(_INTERVAL)
            self._wake.clear()

    def _read(self, rank: int, text: bytes) -> None:
        status = Status(**json.loads(text))
        known = self._seen.get(rank)
        if known is None or known[0].beat != status.beat:
            self._seen[rank] = (status, self._clock)

    def _judge(self) -> None:
        """End this process once a verdict is there: this rank's, or that of rank 0."""
        verdict_since = None
        before = time.monotonic()
        while not self._stopped.wait(_INTERVAL / 2):
            now = time.monotonic()
            # a reader that was stopped itself has missed no more than this
            self._clock += min(now - before, 2 * _INTERVAL)
            before = now
            if self._state in ("failed", "overdue", "finished"):
                continue
            if self._verdict is None:
                # other ranks leave the word to rank 0, as long as it is there
                patience = self._timeout if self._rank == 0 else self._timeout + 3 * _SEARCH_AFTER_A_LOSS
                self._verdict = judge(self._board(), timeout=patience, silence=self._silence)
            if self._verdict is not None:
                verdict_since = self._clock if verdict_since is None else verdict_since
                if not self._verdict.grace or self._state == "lost" or self._clock - verdict_since > _GRACE:
                    self._end(self._verdict)

    def _board(self) -> dict[int, Seen]:
        seen = {
            rank: Seen(status=status, silent_seconds=self._clock - since)
            for rank, (status, since) in tuple(self._seen.items())
        }
        return {**seen, self._rank: Seen(status=self._status(), silent_seconds=0.0)}

    def _status(self) -> Status:
        waiting = self.recorder.waiting_seconds(_WATCHED)
        return Status(
            beat=self._beat,
            state=self._state,
            host=self._host,
            place=self._failed_in or self.recorder.place(),
            step=self.recorder.step,
            collectives=self.recorder.collectives,
            communicates=self.recorder.waiting_seconds(COMMUNICATING) is not None,
            seconds=self._clock - self._lost_at if self._state == "lost" else waiting or 0.0,
            error=self._error,
        )

    def _status_text(self) -> str:
        return json.dumps(asdict(self._status()))

    def _end(self, verdict: Verdict) -> None:
        """Say why, and leave: destructors and exit handlers would wait for the ranks that are gone."""
        code = RESUME_EXIT_CODE if verdict.resume else LOST_RANK_EXIT_CODE
        self._begin_last_resort(code)
        self._wake.set()  # rank 0 posts its verdict
        message = verdict.message
        if self._rank not in verdict.guilty:
            message += f"; rank {self._rank} was in {self._failed_in or self.recorder.place()}"
        innocent = (rank for rank in range(self._world_size) if rank not in verdict.guilty)
        # every log has the line, the console once
        level = logging.CRITICAL if self._rank == next(innocent, 0) else logging.INFO
        logger.log(level, message)
        self._dump(message, guilty=verdict.guilty)
        if self._rank == 0:
            time.sleep(_LAST_WORDS)
        self._leave(code)

    def _begin_last_resort(self, code: int) -> None:
        last_resort = threading.Timer(_LAST_RESORT, os._exit, [code])
        last_resort.daemon = True
        last_resort.start()

    def _leave(self, code: int) -> None:
        for handler in logger.handlers:
            handler.flush()
        sys.stderr.flush()
        os._exit(code)

    def _dump(self, reason: str, *, guilty: Sequence[int], error: BaseException | None = None) -> None:
        if self._folder is not None:
            try:
                self.recorder.dump(self._folder, reason, guilty=guilty, error=error)
            except OSError as problem:
                logger.warning("the flight file cannot be written: %s", problem)


def _key(rank: int) -> str:
    return f"rank/{rank}"


def _is_lost_connection(error: BaseException) -> bool:
    """Gloo and NCCL say it with a RuntimeError, in words of their own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl"))
    )
