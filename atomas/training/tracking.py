"""Where the records of a run go: `metrics.jsonl`, which is the truth, and dashboards beside it.

A dashboard that fails is dropped with one warning, and training goes on. None is open where nothing asks for it.
"""

import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from atomas.config import Config
from atomas.errors import AtomasError
from atomas.training.telemetry import MetricsFile, logger


class Dashboard(Protocol):
    """Something that draws numbers over steps."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Write out what is held back."""


class Records:
    """The records of one attempt; nothing is written where it is not `enabled`."""

    def __init__(self, config: Config, attempt: Path, *, enabled: bool) -> None:
        """Open what the configuration asks for in the folder of the attempt.

        Raises:
            AtomasError: a package is not installed.
        """
        self._file = MetricsFile(attempt / "metrics.jsonl", enabled=enabled)
        self._dashboards: dict[str, Dashboard] = {}
        if enabled and config.tracking.tensorboard:
            self._open("tensorboard", "tensorboardX", TensorBoard, attempt / "tensorboard")
        if enabled and config.tracking.wandb_project:
            self._open("wandb_project", "wandb", WeightsAndBiases, attempt, config)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step; `kind` is `train`, `validation` or `checkpoint`."""
        self._file.write(kind, step, values)
        for key, dashboard in list(self._dashboards.items()):
            try:
                dashboard.write(step, {f"{kind}/{name}": value for name, value in values.items()})
            except Exception as error:
                del self._dashboards[key]
                _warn(key, error)

    def close(self) -> None:
        """Close all."""
        self._file.close()
        for key, dashboard in self._dashboards.items():
            try:
                dashboard.close()
            except Exception as error:
                _warn(key, error)

    def _open(self, key: str, package: str, kind: Any, *arguments: Any) -> None:
        if importlib.util.find_spec(package) is None:
            raise AtomasError(
                f"tracking.{key} needs the package {package}, which is not installed: pip install {package}"
            )
        try:
            self._dashboards[key] = kind(*arguments)
        except Exception as error:
            _warn(key, error)


class TensorBoard:
    """TensorBoard event files, written at once.

    By the event writer of tensorboardX without its queue: once the queue's thread has died of a full disk, whoever adds
    to it waits for ever.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._events = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summaries = importlib.import_module("tensorboardX.proto.summary_pb2")
        writer = importlib.import_module("tensorboardX.event_file_writer")
        self._writer = writer.EventsWriter(str(folder / "events"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One event with all values of a step."""
        summary = self._summaries.Summary(
            value=[
                self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in values.items()
            ]
        )
        self._writer.write_event(self._events.Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """One run of Weights & Biases for each attempt, grouped by the name of our run."""

    def __init__(self, attempt: Path, config: Config) -> None:
        self._run = importlib.import_module("wandb").init(
            project=config.tracking.wandb_project,
            group=config.run.name,
            name=f"{config.run.name}, attempt {attempt.name}",
            dir=attempt,
            config=dataclasses.asdict(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send all values of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


def _warn(key: str, error: Exception) -> None:
    reason = " ".join(str(error).split())
    logger.warning("tracking.%s failed and is switched off: %s: %s", key, type(error).__name__, reason)
