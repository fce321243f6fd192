"""All faults, in the order of the table."""

from tests.faults import files, ranks, services, signals
from tests.faults.outcome import FAULTS

__all__ = ["FAULTS", "files", "ranks", "services", "signals"]
