"""Checkpoints that are written while training goes on, one at a time.

At a step boundary every rank takes a snapshot, and a thread beside the loop writes this rank's files. At the
boundaries that follow the ranks vote whether all have written; then rank 0 completes and publishes the checkpoint, in
its thread again, and a later vote tells everybody. So threads never wait for each other, no rank does for a slow disk,
and what fails on one rank is known to all. LATEST names a checkpoint only after it is complete on the disk.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from atomas.config import CheckpointConfig
from atomas.distributed.agreement import each_of_any_rank
from atomas.distributed.collectives import rank
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.phases import phase
from atomas.training.checkpoint import (
    FileEntry,
    checkpoint_name,
    file_entries,
    prune_checkpoints,
    publish,
)
from atomas.training.run_directory import RunDirectory
from atomas.training.snapshot import HostCopies, Snapshot, saved_in_doubt
from atomas.training.telemetry import logger

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two votes while the loop waits for a checkpoint; growing, as the flight recorder keeps each vote."""
_PARTS = ".parts"
"""Folder in which ranks leave the manifest entries of their files until the checkpoint is published."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that has been published."""

    step: int
    seconds: float
    """From the snapshot to the vote that told of its publication"""
    stalled_seconds: float
    """In which the loop waited for it"""

    def record(self) -> dict[str, float]:
        """For `metrics.jsonl`."""
        return {"seconds": self.seconds, "stalled_seconds": self.stalled_seconds}


class Saver:
    """One rank's part in writing checkpoints. All ranks call the same methods at the same step boundaries."""

    def __init__(self, run: RunDirectory, config: CheckpointConfig, device: torch.device) -> None:
        self._run, self._config, self._device = run, config, device
        self.report: Callable[[Saved], None] = lambda saved: None
        """Is told of each checkpoint"""
        self._job: _Job | None = None
        self._copies = HostCopies()
        self._failures = 0
        self.best_score = float("-inf")
        """Best validation score of which a checkpoint is, or is being, published"""

    @property
    def busy(self) -> bool:
        """This rank is writing: one of the votes of a boundary."""
        return self._job is not None and self._job.busy

    @property
    def failed(self) -> bool:
        """This rank could not write: the other vote."""
        return self._job is not None and self._job.error is not None

    def begin(
        self, take: Callable[[HostCopies | None], Snapshot], step: int, *, score: float | None, wait: bool
    ) -> None:
        """Begin to save the present step, after the end of a checkpoint that is still being written. Collective.

        Args:
            take: makes the snapshot, of copies if it is given a place for them.
            step: optimizer steps done.
            score: the validation score, where it is the best so far.
            wait: return only when the checkpoint is published, and let it not fail.

        Raises:
            AtomasError: too many checkpoints have failed, or this one has and is waited for.
        """
        begun = time.monotonic()
        with phase("checkpoint"):
            self._wait(must_succeed=False)
            final = self._run.checkpoints / checkpoint_name(step)
            self._job = job = _Job(
                final=final, step=step, former_best=self.best_score, is_best=score is not None, begun=begun
            )
            if score is not None:
                self.best_score = score
            beside = self._config.asynchronous and not wait
            try:
                snapshot = take(self._copies if beside else None)
            except Exception as error:  # no memory for the copies: the others must hear of it
                job.error = error
            else:
                job.snapshot = snapshot
                job.start(job.write_part)
            job.stalled = time.monotonic() - begun
            if not beside:
                self._wait(must_succeed=wait)

    def finish(self, *, must_succeed: bool = True) -> None:
        """Wait for the checkpoint that is being written, if there is one. Collective."""
        with phase("checkpoint"):
            self._wait(must_succeed=must_succeed)

    def advance(self, busy: bool, failed: bool, *, must_succeed: bool = False) -> None:
        """Go on with the checkpoint that is being written, if there is one. The same on all ranks.

        Args:
            busy: any rank is.
            failed: any rank has.
            must_succeed: a failure ends the run.

        Raises:
            AtomasError: it has failed, and no more may.
        """
        job = self._job
        if job is None or busy:
            return
        if failed:
            self._give_up(job, must_succeed)
        elif job.publishing:
            self._job, self._failures = None, 0
            seconds = time.monotonic() - job.begun
            logger.info("saved %s%s", job.final, " (best so far)" if job.is_best else "")
            self.report(Saved(step=job.step, seconds=seconds, stalled_seconds=job.stalled))
        else:
            job.publishing = True
            if rank() == 0:
                job.start(lambda: self._publish(job))

    def _wait(self, *, must_succeed: bool) -> None:
        pause = _FIRST_PAUSE
        while self._job is not None:
            begun = time.monotonic()
            if self._job.busy:
                self._job.join(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            busy, failed = each_of_any_rank([self.busy, self.failed], self._device)
            self._job.stalled += time.monotonic() - begun
            self.advance(busy, failed, must_succeed=must_succeed)

    def _publish(self, job: "_Job") -> None:
        job.complete()
        job.whole = True
        try:
            self._run.point("LATEST", job.final)
            if job.is_best:
                self._run.point("BEST", job.final)
        finally:  # on a disk that is full now, it makes the room for the next one
            self._prune()

    def _prune(self) -> None:
        keep_last, keep_every = self._config.keep_last, self._config.keep_every
        try:
            best = self._run.pointed("BEST")
            prune_checkpoints(
                self._run.checkpoints,
                keep_last=keep_last,
                keep_every=keep_every,
                best=best,
                in_doubt=saved_in_doubt,
            )
        except OSError as error:  # the new one is there all the same
            logger.warning("older checkpoints could not be removed: %s", error)

    def _give_up(self, job: "_Job", must_succeed: bool) -> None:
        self._job = None
        self.best_score = job.former_best
        self._failures += 1
        if rank() == 0:
            shutil.rmtree(job.partial, ignore_errors=True)
        reason = "on another rank; its log says why"
        if job.error is not None:
            reason = f"on rank {rank()}: {' '.join(str(job.error).split()) or type(job.error).__name__}"
        message = f"checkpoint {job.final.name} could not be {'published' if job.publishing else 'written'} {reason}"
        if job.whole:
            message = f"checkpoint {job.final.name} is whole, but LATEST or BEST could not be made to name it {reason}"
        message += "; older ones stay as they are"
        if must_succeed or self._failures > self._config.failures_allowed:
            raise AtomasError(message)
        level = logger.info if job.error is None else logger.error
        level("%s; training goes on, the next checkpoint tries again", message)


@dataclass(kw_only=True)
class _Job:
    """A checkpoint that is being written."""

    final: Path
    step: int
    is_best: bool
    former_best: float
    begun: float
    stalled: float = 0.0
    publishing: bool = False
    whole: bool = False
    """On rank 0: it is published, though LATEST may not name it"""
    snapshot: Snapshot | None = None
    error: Exception | None = None
    thread: threading.Thread | None = None

    @property
    def partial(self) -> Path:
        return self.final.with_name(f"{self.final.name}.partial")

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait for the thread, no longer than that."""
        if self.thread is not None:
            self.thread.join(seconds)

    def start(self, work: Callable[[], None]) -> None:
        """Do it in a thread of its own, which keeps what is raised."""
        self.thread = threading.Thread(target=self._guarded, args=[work], daemon=True, name="checkpoint")
        self.thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.error = error

    def write_part(self) -> None:
        """This rank's files, and their entries in the manifest."""
        assert self.snapshot is not None
        names = self.snapshot.write_part(self.partial)
        (self.partial / _PARTS).mkdir(exist_ok=True)
        entries = file_entries({name: self.partial / name for name in names})
        write_json(self.partial / _PARTS / f"{rank()}.json", entries)

    def complete(self) -> None:
        """Rank 0, when all parts are written: the rest, the manifest, and the name that means "complete"."""
        assert self.snapshot is not None
        self.snapshot.write_rest(self.partial)
        known: dict[str, FileEntry] = {}
        for path in sorted((self.partial / _PARTS).iterdir()):
            known |= json.loads(path.read_text(encoding="utf-8"))
        shutil.rmtree(self.partial / _PARTS)
        publish(self.partial, self.final, self.step, known)
