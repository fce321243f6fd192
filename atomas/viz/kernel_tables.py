"""Markdown tables of reports of `atomas bench kernels`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BASELINES = ("eager_padded", "eager_masked", "compile_masked")
BACKENDS = ("native", "triton", "reference")


@dataclass(frozen=True, kw_only=True)
class BenchmarkProblem:
    """The rows of one operator, shape and dtype."""

    op: str
    shape: dict[str, int]
    dtype: str
    rows: dict[str, dict[str, dict[str, Any]]]
    """By provider and mode."""

    @property
    def mode(self) -> str:
        """What providers are compared by: forward and backward where there is a backward."""
        modes = next(iter(self.rows.values()))
        return "full" if "full" in modes else next(iter(modes))

    @property
    def sizes(self) -> str:
        """The shape in words."""
        return ", ".join(f"{name} {size:,}" for name, size in self.shape.items())

    @property
    def ours(self) -> str | None:
        """The fastest of our backends."""
        timed = [name for name in BACKENDS if name in self.rows and self.row(name)["status"] == "ok"]
        return min(timed, key=self.milliseconds, default=None)

    def row(self, provider: str) -> dict[str, Any]:
        """The row that a provider is compared by; of one without a backward, that of its forward."""
        return self.rows[provider][self.mode]

    def milliseconds(self, provider: str) -> float:
        """Median."""
        value: float = self.row(provider)["ms"]["p50"]
        return value

    def times_ours(self, provider: str) -> str:
        """Ratio to our time, or what is in its place."""
        status = self.row(provider)["status"] if provider in self.rows else "unavailable"
        if status == "oom":
            return "out of memory"
        if status == "unavailable" or self.ours is None:
            return "-"
        return f"{self.milliseconds(provider) / self.milliseconds(self.ours):.1f} x"


def benchmark_problems(report: dict[str, Any]) -> list[BenchmarkProblem]:
    """The rows of a report by operator, shape and dtype, in their order."""
    found: dict[str, BenchmarkProblem] = {}
    for row in report["rows"]:
        key = json.dumps([row["op"], row["shape"], row["dtype"]])
        problem = found.setdefault(
            key, BenchmarkProblem(op=row["op"], shape=row["shape"], dtype=row["dtype"], rows={})
        )
        problem.rows.setdefault(row["provider"], {})[row["mode"]] = row
    order = [*BASELINES, *BACKENDS]
    for problem in found.values():
        for name in sorted(problem.rows, key=lambda name: order.index(name) if name in order else len(order)):
            problem.rows[name] = problem.rows.pop(name)
    return list(found.values())


def benchmark_table(report: dict[str, Any]) -> str:
    """Markdown of a report of `atomas bench kernels`, a line per shape: our time and the others' in times of it."""
    problems = benchmark_problems(report)
    columns = [name for name in BASELINES if any(name in problem.rows for problem in problems)]
    lines = [
        f"| operator | sizes | {' | '.join(['ours, ms', *columns, 'other packages'])} |",
        f"|---|---|{'---:|' * (len(columns) + 1)}---|",
    ]
    for problem in problems:
        others = [
            f"{name} {problem.times_ours(name)}"
            for name in problem.rows
            if name not in (*BASELINES, *BACKENDS) and problem.row(name)["status"] != "unavailable"
        ]
        own = f"{number(problem.milliseconds(problem.ours))} ({problem.ours})" if problem.ours else "-"
        cells = [own, *(problem.times_ours(name) for name in columns), ", ".join(others)]
        lines.append(f"| {problem.op} | {problem.sizes} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _benchmark_footnote(report), *_not_timed(report)])


def memory_table(report: dict[str, Any]) -> str:
    """Markdown of a report of `atomas bench kernels`, a line per shape: peak memory beyond the inputs, MiB."""
    problems = benchmark_problems(report)
    columns = [
        name
        for name in dict.fromkeys(name for problem in problems for name in problem.rows)
        if any(problem.row(name)["status"] != "unavailable" for problem in problems if name in problem.rows)
    ]
    lines = [
        f"| operator | sizes | tokens | {' | '.join(columns)} |",
        f"|---|---|---:|{'---:|' * len(columns)}",
    ]
    for problem in problems:
        rows = [problem.row(name) if name in problem.rows else None for name in columns]
        tokens = sum(
            next(iter(problem.rows.values()))[problem.mode]["lengths"].get(side, 0)
            for side in ("text", "smiles")
        )
        lines.append(f"| {problem.op} | {problem.sizes} | {tokens:,} | {' | '.join(map(_memory, rows))} |")
    return "\n".join([*lines, "", _benchmark_footnote(report), *_not_timed(report)])


def full_benchmark_table(report: dict[str, Any]) -> str:
    """Markdown of a report of `atomas bench kernels`, a line per provider and shape with everything measured."""
    lines = [
        "| operator | sizes | dtype | provider | forward, ms | backward, ms | both, ms | times ours | peak, MiB "
        "| TFLOP/s | deviation |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for problem in benchmark_problems(report):
        for name, modes in problem.rows.items():
            row = problem.row(name)
            start = f"| {problem.op} | {problem.sizes} | {problem.dtype} | {name} |"
            if row["status"] != "ok":
                lines.append(f"{start} {row['reason']} |" + " |" * 6)
                continue
            times = [
                number(modes[m]["ms"]["p50"]) if m in modes and modes[m]["ms"] else ""
                for m in ("fwd", "bwd", "full")
            ]
            rate = "" if row["tflops"] is None else f"{row['tflops']:.3g}"
            cells = [*times, problem.times_ours(name), _memory(row), rate, f"{row['error']:.1e}"]
            lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join([*lines, "", _benchmark_footnote(report)])


def number(value: float) -> str:
    """Three digits or more, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _benchmark_footnote(report: dict[str, Any]) -> str:
    machine, rows = report["machine"], report["rows"]
    threads = sorted({row["threads"] for row in rows})
    where = (
        machine["gpu"] or f"{machine['processor']} ({machine['instruction_set']}), {_list(threads)} thread"
    )
    return (
        f"{where}, {_list(sorted({row['dtype'] for row in rows}))}, torch {report['versions']['torch']}, "
        f"load average {machine['load']}. Medians of forward and backward together, of the forward where there is "
        "no gradient."
    )


def _not_timed(report: dict[str, Any]) -> list[str]:
    """A sentence with the providers that could nowhere be timed, and why."""
    timed = {(row["op"], row["provider"]) for row in report["rows"] if row["status"] != "unavailable"}
    reasons: dict[str, set[str]] = {}
    for row in report["rows"]:
        if (row["op"], row["provider"]) not in timed and row["provider"] not in BACKENDS:
            reasons.setdefault(row["provider"], set()).add(row["reason"].partition(" by ")[0])
    if not reasons:
        return []
    return [
        "",
        "Not timed: "
        + "; ".join(f"{name} ({', '.join(sorted(why))})" for name, why in reasons.items())
        + ".",
    ]


def _memory(row: dict[str, Any] | None) -> str:
    if row is None or row["status"] == "unavailable" or (row["status"] == "ok" and row["peak_mb"] is None):
        return "-"
    return "out of memory" if row["status"] == "oom" else number(row["peak_mb"])


def _list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
