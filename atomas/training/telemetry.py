"""What a run writes while it goes: `metrics.jsonl`, a log per rank, and a line or bar for people."""

import json
import logging
import platform
import resource
import sys
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from atomas_kernels import active_backends

logger = logging.getLogger("atomas")


def start_logging(log_file: Path, rank: int) -> None:
    """Everything to this rank's file; warnings of every rank, and news of rank 0, to standard error."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for old in logger.handlers[:]:
        logger.removeHandler(old)
    form = logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s", datefmt="%H:%M:%S")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    for handler, level in (
        (logging.FileHandler(log_file), logging.INFO),
        (logging.StreamHandler(), logging.INFO if rank == 0 else logging.WARNING),
    ):
        handler.setFormatter(form)
        handler.setLevel(level)
        logger.addHandler(handler)
    # DeepSpeed calls collectives that torch 2.13 has renamed; nothing that a user of a run can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    for noisy in ("DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def environment(config_device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions and machine, so that a number can be traced to what made it."""
    packages = ("atomas", "torch", "deepspeed", "transformers", "triton", "rdkit", "webdataset", "tokenizers")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(config_device),
        "device_name": torch.cuda.get_device_name(config_device)
        if config_device.type == "cuda"
        else _cpu_name(),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "kernels": active_backends(config_device),
        "versions": {name: _version(name) for name in packages},
    }


def memory_mb(device: torch.device) -> dict[str, float]:
    """Peak memory in MiB since the start.

    On CUDA `peak_memory_mb` is what tensors held and `reserved_memory_mb` what the allocator took from the device; on
    the CPU `peak_memory_mb` is the resident memory of the process.
    """
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_memory_mb": allocated / 2**20, "reserved_memory_mb": reserved / 2**20}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_mb": peak / (2**20 if sys.platform == "darwin" else 2**10)}


class MetricsFile:
    """`metrics.jsonl`: one JSON object per step, flushed at once; nothing where it is not `enabled`.

    A line that cannot be written, as on a full disk, is lost with a warning, and training goes on.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self._file = path.open("ab", buffering=0) if enabled else None
        self._cut = False
        """The last line may be there in part"""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append the numbers of a step; `kind` is `train`, `validation` or `checkpoint`."""
        if self._file is None:
            return
        line = json.dumps({"kind": kind, "step": step, **values}).encode() + b"\n"
        line = b"\n" * self._cut + line
        try:
            self._cut = self._file.write(line) < len(line)
            problem = "it was cut" if self._cut else ""
        except OSError as error:
            self._cut, problem = True, str(error)
        if problem:
            logger.warning("the metrics of step %d could not be written: %s", step, problem)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Training records of all attempts of a run in step order; where attempts overlap, the later one counts.

    A last line that a kill cut off is left out.
    """
    by_step: dict[tuple[str, int], dict[str, Any]] = {}
    attempts = sorted((run / "attempts").glob("*/metrics.jsonl"), key=lambda path: int(path.parent.name))
    for path in attempts:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            by_step[record["kind"], record["step"]] = record
    return [by_step[key] for key in sorted(by_step, key=lambda key: (key[1], key[0]))]


class Progress:
    """A live bar on a terminal; single lines, every `every` steps, where output goes to a file."""

    def __init__(self, *, start: int, total: int, every: int, enabled: bool) -> None:
        self._every, self._total = every, total
        self._started, self._start = time.monotonic(), start
        self._enabled = enabled
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            disable=not (enabled and sys.stderr.isatty()),
            dynamic_ncols=True,
        )

    def step(self, step: int, shown: dict[str, float]) -> None:
        """`step` optimizer steps are done."""
        if not self._bar.disable:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self._bar.update(1)
        elif self._enabled and (step % self._every == 0 or step == self._total):
            rate = (step - self._start) / max(1e-9, time.monotonic() - self._started)
            left = (self._total - step) / max(1e-9, rate)
            values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            logger.info(
                "step %d/%d  %s  %.2f steps/s  %s left", step, self._total, values, rate, _clock(left)
            )

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor()
    )
