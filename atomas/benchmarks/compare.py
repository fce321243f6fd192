"""Two benchmark reports side by side: what became slower, what faster, beyond the noise of both."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atomas.errors import AtomasError

Verdict = Literal["faster", "slower", "same", "lost", "gained"]

KEYS = ("op", "provider", "mode", "shape", "batch", "ranks", "dtype", "threads", "device")
"""Fields that say what a row measured, as far as it has them."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Quantiles of one row, in seconds."""

    low: float
    middle: float
    high: float
    peak_mb: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of two reports."""

    what: str
    before: Timing | None
    """None where it could not be timed"""
    after: Timing | None

    @property
    def ratio(self) -> float | None:
        """Time after over time before."""
        if self.before is None or self.after is None:
            return None
        return self.after.middle / self.before.middle

    @property
    def verdict(self) -> Verdict:
        """Faster or slower only where the middle three fifths of the runs do not overlap."""
        if self.before is None or self.after is None:
            return "lost" if self.after is None else "gained"
        if self.after.low > self.before.high:
            return "slower"
        return "faster" if self.after.high < self.before.low else "same"

    def slower_than(self, percent: float) -> bool:
        """Whether it is slower beyond noise by more than `percent`, or cannot be timed any more."""
        if self.verdict == "slower":
            assert self.ratio is not None
            return self.ratio > 1 + percent / 100
        return self.verdict == "lost"


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Comparison]:
    """The rows that both reports have, but for those that neither could time.

    Raises:
        AtomasError: they have no row in common.
    """
    old = {_key(row): row for row in before["rows"]}
    new = {_key(row): row for row in after["rows"]}
    shared = [key for key in old if key in new]
    if not shared or before.get("preset") != after.get("preset"):
        raise AtomasError("the reports have no row in common: they measure different things")
    for key in shared:
        comparison = Comparison(what=_words(old[key]), before=_timing(old[key]), after=_timing(new[key]))
        if comparison.before or comparison.after:
            yield comparison


def different_places(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What else than the code differs between the machines of two reports, in words."""
    found = []
    for field in ("processor", "gpu", "cores"):
        values = [report["machine"].get(field) for report in (before, after)]
        if values[0] != values[1]:
            found.append(f"{field}: {values[0]} and {values[1]}")
    for package in before["versions"]:
        values = [report["versions"].get(package) for report in (before, after)]
        if values[0] != values[1]:
            found.append(f"{package}: {values[0]} and {values[1]}")
    return found


def read(path: Path) -> dict[str, Any]:
    """A report of `atomas bench step` or `atomas bench kernels`; AtomasError where the file is none."""
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        complete = isinstance(report["rows"], list) and report["machine"] and report["versions"]
    except OSError as error:
        raise AtomasError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AtomasError(f"{path} is not a benchmark report") from error
    if not complete:
        raise AtomasError(f"{path} holds no measurement")
    return report


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row.get(key) for key in KEYS], sort_keys=True)


def _words(row: Mapping[str, Any]) -> str:
    parts = []
    for key in KEYS:
        value = row.get(key)
        if isinstance(value, Mapping):
            parts += [f"{name} {size}" for name, size in value.items()]
        elif value is not None:
            parts.append(f"{key} {value}" if isinstance(value, int) else str(value))
    return ", ".join(parts)


def _timing(row: Mapping[str, Any]) -> Timing | None:
    """Of either kind of report; None where the provider could not be timed."""
    if row["status"] != "ok":
        return None
    found, scale = (row["ms"], 1e-3) if "ms" in row else (row["step_seconds"], 1.0)
    return Timing(
        low=found["p20"] * scale,
        middle=found["p50"] * scale,
        high=found["p80"] * scale,
        peak_mb=row.get("peak_mb"),
    )
