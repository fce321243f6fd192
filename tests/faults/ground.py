"""Where faults are played: a corpus, a run that nothing happens to, and `atomas launch` with something happening."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from atomas.data.demo import build_demo_corpus
from atomas.training.autopsy import examine
from atomas.training.telemetry import read_metrics
from tests.faults.outcome import CannotPlayError, Outcome
from tests.ranks import LAUNCHER_VARIABLES
from tests.training.conftest import SMALL, losses

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 6, 2
"""Steps of a run, and between its checkpoints."""
SILENCE = 10
"""run.silence_timeout_seconds of these runs; its default of 300 suits networks that hang for a while."""
PATIENCE = 300
"""Seconds that anything may take here, on a busy machine."""


@dataclass
class Ground:
    """A folder with a corpus."""

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        build_demo_corpus(self.folder / "corpus", pairs=240, seed=3, workers=1)

    @cached_property
    def undisturbed(self) -> list[float]:
        """Losses of a run of two ranks that nothing happens to."""
        with self.run("undisturbed") as run:
            run.ends(0)
        return losses(run.folder)

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        *options: str,
        profile: str = "",
        fault: str = "",
        in_every_attempt: bool = False,
        train: Sequence[str] = (),
        runs: Path | None = None,
        environ: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        corpus: Path | None = None,
    ) -> Iterator["Run"]:
        """`atomas launch OPTIONS -- train ...`; whatever it started ends with the block.

        Args:
            name: of the run; the same name again continues it.
            options: of `atomas launch`; two processes on this host without any.
            profile: further lines of the cluster's profile.
            fault: what `faulty_rank` is told, in the run's first attempt alone
            in_every_attempt: or in each.
            train: options of `atomas train`.
            runs: folder of the run, in which it is a folder of its name.
            environ: further variables of the launcher.
            prefix: what stands before the launcher's command.
            corpus: another one than the ground's.
        """
        folder = (runs or self.folder / "runs") / name
        python = self._interpreter(folder, fault, in_every_attempt)
        cluster = self.folder / f"{name}.yaml"
        cluster.write_text(f"python: {python}\ndevice: cpu\n{profile}", encoding="utf-8")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}
        clean |= {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(self.folder / "state"), **self.environ}
        clean |= {"ATOMAS_STRUCK": str(self.folder / f"{name}.struck"), **(environ or {})}
        launch = [
            *prefix, sys.executable, "-m", "atomas", "launch", f"--cluster={cluster}",
            *(options or ("--gpus-per-node=2",)), "--", "train", *SMALL, f"--training.max_steps={STEPS}",
            f"--checkpoint.every={EVERY}", f"--data.corpus={corpus or self.folder / 'corpus'}",
            f"--run.output_dir={folder.parent}", f"--run.name={name}", f"--run.silence_timeout_seconds={SILENCE}",
            *train,
        ]  # fmt: skip
        output = self.folder / f"{name}.output"
        started = time.time()
        with output.open("ab") as file:
            position = file.tell()
            process = subprocess.Popen(
                launch, cwd=ROOT, env=clean, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        run = Run(self, folder, process, output, position, started)
        try:
            yield run
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _interpreter(self, run: Path, fault: str, in_every_attempt: bool) -> Path:
        """A python that plays the fault."""
        path = self.folder / f"{run.name}.python"
        real = shlex.quote(sys.executable)
        condition = '[ "$2" = atomas ] && [ "$3" = train ]'
        if not in_every_attempt:
            condition += f" && [ ! -e {shlex.quote(str(run))}/attempts/1 ]"
        strike = f'if {condition}; then exec {real} -m tests.distributed.faulty_rank {fault} "${{@:3}}"; fi\n'
        path.write_text(
            f'#!/bin/bash\n{strike if fault else ""}exec {real} "$@"\n',
            encoding="utf-8",
        )
        path.chmod(0o755)
        return path


@dataclass
class Run:
    """One launch of a run."""

    ground: Ground
    folder: Path
    process: "subprocess.Popen[bytes]"
    output: Path
    position: int
    """Where this launch's part of the output begins."""
    started: float

    def text(self) -> str:
        """What the launch has written so far."""
        return self.output.read_bytes()[self.position :].decode(errors="replace")

    def ends(self, *codes: int) -> float:
        """Wait for the launch's end; the time of it."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end: {self.text()[-4000:]}") from None
        assert self.process.returncode in codes, f"{self.process.returncode}: {self.text()[-4000:]}"
        return time.time()

    def until(self, condition: Callable[[], Any], what: str) -> float:
        """Wait for something while the launch goes on; the time at which it was seen."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"not within {PATIENCE} s: {what}; {self.text()[-4000:]}"
            time.sleep(0.05)
        return time.time()

    def says(self, words: str) -> float:
        """Wait until the launch has written the words."""
        return self.until(lambda: words in self.text(), words)

    def steps(self, attempt: int = 1) -> list[int]:
        """Steps that an attempt has written so far."""
        path = self.folder / "attempts" / str(attempt) / "metrics.jsonl"
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # half written
                record = json.loads(line)
                found += [record["step"]] if record["kind"] == "train" else []
        return found

    def trains(self, attempt: int) -> float:
        """Wait for the first step of an attempt."""
        return self.until(lambda: self.steps(attempt), f"a step of attempt {attempt}")

    def struck(self) -> float:
        """Wait for the strike; its time."""
        path = self.ground.folder / f"{self.folder.name}.struck"
        self.until(lambda: path.exists() and path.read_text(encoding="utf-8"), "the fault")
        return float(path.read_text(encoding="utf-8"))

    def log(self, rank: int = 0, attempt: int = 1) -> str:
        """A rank's log."""
        path = self.folder / "attempts" / str(attempt) / f"rank_{rank:04d}.log"
        return path.read_text(encoding="utf-8")

    def story(self, attempt: int = 1) -> str:
        """What `atomas doctor RUN` says of an attempt."""
        return examine(self.folder, attempt).story

    def outcome(
        self, *, happened: str, start: str, again: str, struck: float, detected: float, by_hand: float | None = None,
        resumed: float, attempts: tuple[int, int] = (1, 2),
    ) -> Outcome:  # fmt: skip
        """Compare the whole run with the undisturbed one."""
        first, second = (self.steps(attempt) for attempt in attempts)
        expected, found = self.ground.undisturbed, losses(self.folder)
        assert [r["step"] for r in read_metrics(self.folder) if r["kind"] == "train"] == list(
            range(1, STEPS + 1)
        )
        deviation = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
        since = struck if by_hand is None else by_hand
        return Outcome(
            happened=happened, start=start, again=again, steps_lost=len(set(first) & set(second)),
            detect_seconds=round(detected - struck, 1), resume_seconds=round(resumed - since, 1), deviation=deviation,
        )  # fmt: skip


def needs(*programs: str) -> None:
    """Raise CannotPlayError where one is not installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    if missing:
        raise CannotPlayError(f"needs {', '.join(missing)} on this host")
