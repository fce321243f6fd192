"""The folder of a run: configuration, one attempt per start, checkpoints.

runs/NAME/config.yaml            the configuration of the newest attempt
          attempts/1/            env.json, deepspeed.json, metrics.jsonl, rank_0000.log, ...
          checkpoints/step_*/    published checkpoints
          LATEST, BEST           names of the newest and of the best checkpoint
          data_left_out.json     data that the run passes over since a rollback
          KILL, SAVE             make one of these files to stop the run, or to save now
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atomas.config import Config
from atomas.config_file import dump_config
from atomas.disk import sync
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.training.tensor_files import to_disk


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """Paths of one run and of the attempt that is running now."""

    path: Path
    attempt: int

    @classmethod
    def open(cls, config: Config, *, is_rank_zero: bool, attempt: int | None = None) -> "RunDirectory":
        """Make the folders and count the attempt; ranks other than 0 are told the attempt's number.

        Raises:
            AtomasError: the folder cannot be written.
        """
        path = Path(config.run.output_dir) / config.run.name
        if not is_rank_zero:
            assert attempt is not None
            return cls(path=path, attempt=attempt)
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (path / "attempts").mkdir(exist_ok=True)
            numbers = [int(p.name) for p in (path / "attempts").iterdir() if p.name.isdigit()]
            run = cls(path=path, attempt=max(numbers, default=0) + 1)
            run.attempt_path.mkdir()
            for folder in (path, path.parent):  # a checkpoint is nowhere if the folder around it is lost
                sync(folder)
        except OSError as error:
            raise AtomasError(f"run folder {path} cannot be written: {error}") from None
        return run

    @property
    def attempt_path(self) -> Path:
        """Logs and metrics of this start."""
        return self.path / "attempts" / str(self.attempt)

    @property
    def checkpoints(self) -> Path:
        """Published checkpoints."""
        return self.path / "checkpoints"

    def write_config(self, config: Config) -> None:
        """Keep the configuration of this attempt, once it is known to be one of this run."""
        (self.path / "config.yaml").write_text(dump_config(config), encoding="utf-8")

    def point(self, name: str, checkpoint: Path) -> None:
        """Let LATEST or BEST name a checkpoint; a reader sees the old name or the new one."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(checkpoint.name + "\n", encoding="utf-8")
        to_disk(temporary)
        temporary.replace(self.path / name)
        sync(self.path)

    def name_in(self, name: str) -> str | None:
        """The name of the checkpoint that LATEST or BEST holds, whether it is still there or not."""
        try:
            return (self.path / name).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def pointed(self, name: str) -> Path | None:
        """The checkpoint that LATEST or BEST names, if it is still there."""
        checkpoint = self.checkpoints / (self.name_in(name) or "none")
        return checkpoint if checkpoint.is_dir() else None

    def data_left_out(self) -> list[Any]:
        """Ranges of data that a rollback left out: known to the run before any checkpoint is.

        Raises:
            AtomasError: the file cannot be read.
        """
        path = self.path / "data_left_out.json"
        try:
            return list(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise AtomasError(f"{path} cannot be read: {error}") from None

    def leave_data_out(self, ranges: Sequence[Any]) -> None:
        """Counterpart of `data_left_out`."""
        write_json(self.path / "data_left_out.json", ranges)

    def kill_requested(self) -> bool:
        """Somebody made a file KILL."""
        return (self.path / "KILL").exists()

    def take_save_request(self) -> bool:
        """Somebody made a file SAVE; it is removed, so that it counts once."""
        try:
            (self.path / "SAVE").unlink()
        except FileNotFoundError:
            return False
        return True
