"""Progress of a long operation: a bar on a terminal, single lines in a batch log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LOG_INTERVAL_S = 10.0


class Progress:
    """Count `total` units (None: unknown) on stderr.

    `unit` is the plural printed ("rows"); with `unit="B"` the counts are bytes and scaled. `hidden` shows nothing:
    for all ranks but one.
    """

    def __init__(
        self, label: str, total: int | None, *, unit: str, initial: int = 0, hidden: bool = False
    ) -> None:
        self._hidden = hidden
        self._label = label
        self._total = total
        self._unit = unit
        self._count = initial
        self._started = self._logged = time.monotonic()
        self._bar = tqdm(
            desc=label,
            total=total,
            initial=initial,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            disable=hidden or not sys.stderr.isatty(),
            leave=False,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> None:
        """Add `count` units."""
        self._count += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and not self._hidden and now - self._logged >= LOG_INTERVAL_S:
            self._logged = now
            of = f" of {self._total:,}" if self._total else ""
            print(
                f"{self._label}: {self._count:,}{of} {self._unit}, {now - self._started:.0f} s",
                file=sys.stderr,
                flush=True,
            )
