"""What scoring a set of predictions gives: values with intervals, or the reason why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from platform import python_version
from typing import Any

from rich.console import Console
from rich.table import Table

from atomas.metrics.resampling import Bootstrap, RowStatistic, bootstrap_intervals


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric: a value with its interval, or `None`.

    `reason` says why the value or the interval is missing, or why the value is not what its name leads to expect.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """All metrics of one set of predictions.

    `details` goes into the report as it is: what the metrics were computed with, and what was odd about the rows.
    """

    rows: int
    metrics: dict[str, Score]
    bootstrap: Bootstrap
    details: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The part of a report that every task with predictions has."""
        return {
            "rows": self.rows,
            "metrics": {"n": self.rows, **{name: score.value for name, score in self.metrics.items()}},
            "intervals": {
                name: None if score.interval is None else list(score.interval)
                for name, score in self.metrics.items()
            },
            "reasons": {name: score.reason for name, score in self.metrics.items() if score.reason},
            "bootstrap": {"method": "percentile", **asdict(self.bootstrap)},
            **self.details,
        }


def measure(
    statistics: Mapping[str, RowStatistic],
    bootstrap: Bootstrap,
    *,
    rows: int,
    order: Sequence[str],
    others: Mapping[str, Score],
    details: dict[str, Any],
    reasons: Mapping[str, str] | None = None,
) -> Scores:
    """Values and intervals of `statistics`, with the `others` that are known otherwise, in the order of `order`.

    `reasons` are those of `statistics`, where there is something to say.
    """
    values = {name: statistic.value() for name, statistic in statistics.items()}
    intervals = bootstrap_intervals(statistics, bootstrap)
    metrics = {
        name: Score(value=values[name], interval=intervals[name], reason=(reasons or {}).get(name, ""))
        for name in statistics
    } | dict(others)
    return Scores(
        rows=rows,
        metrics={name: metrics[name] for name in order},
        bootstrap=bootstrap,
        details=details,
    )


def print_scores(console: Console, scores: Scores, title: str) -> None:
    """A table of values and intervals; what is missing stands with its reason."""
    level = f"{100 * scores.bootstrap.level:g} % interval"
    table = Table(title=title)
    table.add_column("metric", no_wrap=True)
    for column in ("value", level):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note")
    for name, score in scores.metrics.items():
        interval = "" if score.interval is None else "{:.4f} - {:.4f}".format(*score.interval)
        value = "null" if score.value is None else f"{score.value:.4f}"
        table.add_row(name, value, interval, score.reason)
    console.print(table)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python, this framework and `packages`, which must be installed."""
    return {"python": python_version()} | {name: version(name) for name in ("atomas", *packages)}
