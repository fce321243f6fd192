"""What becomes of a sample that cannot be read: an error, or another sample in its place and a line in a file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from atomas.errors import AtomasError

FILE_NAME = "bad_samples.jsonl"


class BlockError(AtomasError):
    """A block of a shard cannot be read, or is not what the index says."""

    def __init__(self, message: str, *, shard: str, block: str, offset: int, reason: str) -> None:
        """`shard` is the full name of its file, `offset` the byte at which the block begins."""
        super().__init__(message)
        self.shard, self.block, self.offset, self.reason = shard, block, offset, reason

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the fields on the way from a worker process."""
        return _rebuild, (str(self), self.shard, self.block, self.offset, self.reason)


def _rebuild(message: str, shard: str, block: str, offset: int, reason: str) -> BlockError:
    return BlockError(message, shard=shard, block=block, offset=offset, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A sample that could not be read, and what stands in its place."""

    position: int
    """In the endless stream of all ranks."""
    sample: int
    """Number of the record."""
    stand_in: int
    """Number of the record that was read instead."""
    shard: str
    block: str
    offset: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ErrorPolicy:
    """Whether a run goes on without a sample, and for how long."""

    on_error: Literal["raise", "skip"] = "raise"
    max_consecutive: int = 100
    """Samples of one rank's part of a batch in a row, stand-ins included"""
    max_total: int = 10_000
    """Samples of all ranks since the run began"""

    def check_consecutive(self, count: int, error: BlockError) -> None:
        """`count` samples in a row could not be read, the last for `error`. AtomasError where that is too many."""
        if self.on_error == "raise":
            raise error
        if count > self.max_consecutive:
            raise AtomasError(
                f"{count} samples in a row could not be read, more than data.max_consecutive_skips = "
                f"{self.max_consecutive}; the last: {error}"
            )

    def check_total(self, count: int, run: Path) -> None:
        """`count` samples of the run were skipped. AtomasError where that is too many."""
        if count > self.max_total:
            raise AtomasError(
                f"{count} samples were skipped, more than data.max_skips = {self.max_total}: {run / FILE_NAME} lists "
                "them; restore the shards, or raise the limit"
            )


def append_skipped(run: Path, step: int, skipped: Sequence[Skipped]) -> None:
    """Add a line for each to the run's file; after a resume, steps may come again."""
    _append(run, [{"step": step, **asdict(one)} for one in skipped])


def append_left_out(run: Path, error: BlockError, num_records: int) -> None:
    """Add a line for a block that was unreadable when token lengths were measured: its records are in no step."""
    line = {"step": None, "records": num_records, "shard": error.shard, "block": error.block}
    _append(run, [line | {"offset": error.offset, "reason": error.reason}])


def _append(run: Path, lines: Sequence[dict[str, Any]]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / FILE_NAME).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
