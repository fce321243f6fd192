"""Files that are damaged, lost, or find no room."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.ground import Ground, Run, needs
from tests.faults.outcome import CannotPlayError, Outcome, fault
from tests.faults.ranks import LOCAL, in_short


def newest_is_damaged(ground: Ground, name: str, damage: Callable[[Path], None]) -> Outcome:
    """A run stops after step 4; something happens to that checkpoint; the run continues the one of step 2."""
    with ground.run(name, fault="term 0 4") as run:
        run.ends(75)
    newest = run.folder / "checkpoints" / (run.folder / "LATEST").read_text(encoding="utf-8").strip()
    assert newest.name == "step_00000004", run.text()[-1500:]
    damage(newest)
    with ground.run(name) as again:
        told = again.until(lambda: attempt_log(again, 2).count("ERROR"), "a word of the damage")
        resumed = again.trains(2)
        again.ends(0)
        line = next(line for line in again.log(attempt=2).splitlines() if "ERROR" in line)
        happened = re.sub(r"\S*/checkpoints/", "", line.split("ERROR ")[1])
        return again.outcome(
            happened=happened, start=LOCAL, again="the same command", struck=again.started, detected=told,
            by_hand=again.started, resumed=resumed,
        )  # fmt: skip


def attempt_log(run: Run, attempt: int) -> str:
    with contextlib.suppress(FileNotFoundError):
        return run.log(attempt=attempt)
    return ""


@fault("a bit of a checkpoint file flipped")
def bit_flip(ground: Ground) -> Outcome:
    def flip(checkpoint: Path) -> None:
        path = checkpoint / "shards" / "rank_0001.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return newest_is_damaged(ground, "flipped", flip)


@fault("a checkpoint file cut short")
def truncation(ground: Ground) -> Outcome:
    def cut(checkpoint: Path) -> None:
        path = checkpoint / "model" / "model.safetensors"
        os.truncate(path, path.stat().st_size // 2)

    return newest_is_damaged(ground, "truncated", cut)


@fault("a rank's shard of a checkpoint lost")
def lost_checkpoint_shard(ground: Ground) -> Outcome:
    return newest_is_damaged(
        ground, "lost_shard", lambda checkpoint: (checkpoint / "shards" / "rank_0000.safetensors").unlink()
    )


@fault("a checkpoint's folder lost")
def lost_checkpoint(ground: Ground) -> Outcome:
    return newest_is_damaged(
        ground, "lost_checkpoint", lambda checkpoint: checkpoint.rename(checkpoint.with_name("elsewhere"))
    )


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of that size."""
    needs("mount", "umount")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotPlayError(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@fault("disk full in a save")
def disk_full(ground: Ground) -> Outcome:
    """Something else takes all room before the second save; whoever frees it starts the run again."""
    with small_disk(ground.folder / "small", 64) as disk:
        with ground.run("full", fault="stop 0 4", runs=disk) as run:
            run.struck()  # rank 0 stands still before its fourth step
            ballast = disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
            struck = time.time()
            continue_rank(run, 0)
            detected = run.ends(1, 2, 76)
        # its own log and flight files find no room either
        told = next((line for line in run.text().splitlines() if "No space left" in line), None)
        assert told is not None, run.text()[-4000:]
        happened = re.sub(r"^.*?(ERROR|error:) ", "", told)
        partial = list((run.folder / "checkpoints").glob("*.partial"))
        assert not partial, f"{partial}\n{run.text()[-2500:]}"
        ballast.unlink()
        with ground.run("full", runs=disk) as again:
            resumed = again.trains(2)
            again.ends(0)
            return again.outcome(
                happened=in_short(happened).replace(f"{disk}/", ""), start=LOCAL,
                again="the same command, when there was room", struck=struck, detected=detected,
                by_hand=again.started, resumed=resumed,
            )  # fmt: skip


def continue_rank(run: Run, rank: int) -> None:
    """SIGCONT to a rank that the launch has started."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(run.process.pid)], capture_output=True, text=True, check=True
    )
    for pid in map(int, children.stdout.split()):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            os.kill(pid, 18)
            return
    raise AssertionError(f"no process of rank {rank}")
