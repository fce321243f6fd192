"""One check and its outcome; what several nodes found, put together."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

Status = Literal["ok", "warning", "error", "skipped"]
_RANKING: tuple[Status, ...] = ("ok", "skipped", "warning", "error")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What one check found."""

    name: str
    status: Status
    """skipped: it could not be checked here, and the message says why. Only an error forbids the job."""
    message: str
    remedy: str = ""
    """What to do about a warning or an error."""


def attempt(name: str, check: Callable[[], CheckResult]) -> CheckResult:
    """A check that itself fails is an error of that check, not the end of the others."""
    try:
        return check()
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return CheckResult(name=name, status="error", message=f"the check itself failed: {what}")


def merge(of_nodes: Mapping[str, Sequence[CheckResult]]) -> list[CheckResult]:
    """One result per check from those of several nodes: the worst, naming its nodes."""
    names = list(dict.fromkeys(result.name for results in of_nodes.values() for result in results))
    return [_merge_one(name, of_nodes) for name in names]


def _merge_one(name: str, of_nodes: Mapping[str, Sequence[CheckResult]]) -> CheckResult:
    found = {node: result for node, results in of_nodes.items() for result in results if result.name == name}
    worst = max((result.status for result in found.values()), key=_RANKING.index)
    nodes = [node for node, result in found.items() if result.status == worst]
    told = found[nodes[0]]
    if len(found) == 1 or (len(nodes) == len(found) and len({r.message for r in found.values()}) == 1):
        return told
    where = f"all {len(found)} nodes" if len(nodes) == len(found) else ", ".join(nodes)
    return dataclasses.replace(told, message=f"{where}: {told.message}")


def is_go(results: Sequence[CheckResult]) -> bool:
    """Whether nothing forbids the job."""
    return all(result.status != "error" for result in results)


def as_json(results: Sequence[CheckResult]) -> str:
    """`{"go": ..., "checks": [...]}`."""
    return json.dumps({"go": is_go(results), "checks": [dataclasses.asdict(r) for r in results]}, indent=1)


def print_table(results: Sequence[CheckResult]) -> None:
    """A line per check, its remedy below it where there is one, and the verdict."""
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "warning": "yellow", "error": "red", "skipped": "dim"}
    table = Table(box=None, show_header=False, padding=(0, 1))
    for result in results:
        remedy = f"\n-> {result.remedy}" if result.remedy and result.status in ("warning", "error") else ""
        table.add_row(result.status, result.name, f"{result.message}{remedy}", style=colours[result.status])
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    counts = [f"{sum(r.status == status for r in results)} {status}" for status in reversed(_RANKING)]
    console.print(f"{'go' if is_go(results) else 'NO-GO'}: {', '.join(counts)}")
