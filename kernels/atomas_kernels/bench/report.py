"""The JSON of a benchmark: where it was made, and a row per operator, provider, mode and shape."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from atomas_kernels.bench import memory
from atomas_kernels.bench.lengths import LENGTHS

_PROVENANCE = ("machine", "versions", "commit")


class Report:
    """Rows that are on disk as soon as they are added."""

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        """An empty report; raises ValueError where `path` cannot be written."""
        self.path, self.content = path, {**head, "rows": []}
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--json: {path} cannot be written: {error.strerror}") from error
            self._write()

    @classmethod
    def resume(cls, path: Path, head: dict[str, Any]) -> "Report":
        """The report of a run that was stopped; ValueError where it is not of this machine and commit."""
        if not path.exists():
            return cls(path, head)
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            rows, differing = (
                old["rows"],
                [key for key in _PROVENANCE if _lasting(old, key) != _lasting(head, key)],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--resume: {path} is not a benchmark report; leave --resume out") from error
        if differing:
            raise ValueError(
                f"--resume: {path} was made with another {' and '.join(differing)}; leave --resume out"
            )
        report = cls(path, {key: value for key, value in old.items() if key != "rows"})
        for row in rows:
            report.add(row)
        return report

    def add(self, row: dict[str, Any]) -> None:
        """Append a row and write the file."""
        self.content["rows"].append(row)
        self._write()

    def has(self, **fields: Any) -> bool:
        """Whether some row has all these values."""
        return any(
            all(row.get(key) == value for key, value in fields.items()) for row in self.content["rows"]
        )

    def text(self) -> str:
        """The whole report."""
        return json.dumps(self.content, indent=1) + "\n"

    def _write(self) -> None:
        if self.path is None:
            return
        # Renamed into place, so that a run that is killed leaves a whole file.
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            partial.write_text(self.text(), encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as error:
            raise ValueError(f"--json: {self.path} cannot be written: {error.strerror}") from error


def _lasting(report: dict[str, Any], key: str) -> Any:
    """What must not change while a report is written: the load does."""
    value = report[key]
    return {k: v for k, v in value.items() if k != "load"} if key == "machine" else value


def head(device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gb": round(_memory() / memory.GIB, 1),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "instruction_set": _instruction_set(),
            "load": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version for name in ("triton", *sorted(packages)) if (version := _version(name))},
        },
        "commit": _git("rev-parse", "HEAD") or None,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/kernels", ":/csrc")),
        "length_distribution": LENGTHS,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _instruction_set() -> str | None:
    try:
        from atomas_kernels.native.machine import instruction_set
    except ImportError:
        return None
    return instruction_set


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
