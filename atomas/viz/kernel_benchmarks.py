"""Times and memory of operators as pictures and tables, from reports of `atomas bench kernels`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atomas.errors import AtomasError
from atomas.viz.kernel_tables import (
    BACKENDS,
    BenchmarkProblem,
    benchmark_problems,
    full_benchmark_table,
    number,
)

_PANELS = 2
"""In a row."""


def read_report(path: Path) -> dict[str, Any]:
    """A report; AtomasError where the file is none."""
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        complete = report["machine"] and report["versions"] and isinstance(report["rows"], list)
    except OSError as error:
        raise AtomasError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AtomasError(f"{path} is not a report of `atomas bench`") from error
    if not complete or not report["rows"]:
        raise AtomasError(f"{path} holds no measurement; run `atomas bench` with --json {path}")
    return report


def render_report(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME.md, NAME_OP_time.png and, where the batch grows, NAME_OP_memory.png; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AtomasError(f"{folder} cannot be written: {error.strerror}") from error
    table = folder / f"{name}.md"
    table.write_text(full_benchmark_table(report) + "\n", encoding="utf-8")
    paths = [table]
    problems = benchmark_problems(report)
    for op in dict.fromkeys(problem.op for problem in problems):
        own = [problem for problem in problems if problem.op == op]
        paths.append(plot_times(own, folder / f"{name}_{op}_time.png"))
        if _batches(own):
            paths.append(plot_memory(own, folder / f"{name}_{op}_memory.png"))
    return paths


def plot_times(problems: Sequence[BenchmarkProblem], path: Path) -> Path:
    """A panel per shape with a bar per provider, the ratio to our time at its end."""
    import matplotlib.pyplot as plt

    columns = min(_PANELS, len(problems))
    rows = math.ceil(len(problems) / columns)
    bars = max(len(_shown(problem)) for problem in problems)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(5.2 * columns, rows * (1.2 + 0.32 * bars)),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(problems) :]:
        axis.set_visible(False)
    for axis, problem in zip(axes.flat, problems, strict=False):
        _draw_times(axis, problem)
    figure.suptitle(problems[0].op.replace("_", " "))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_times(axis: Any, problem: BenchmarkProblem) -> None:
    from matplotlib.ticker import NullFormatter

    names = _shown(problem)
    timed = [problem.milliseconds(name) for name in names if problem.row(name)["status"] == "ok"]
    right = max(timed, default=1)
    left = min(min(timed, default=1) / 4, right / 100)  # two decades at least, or ticks overlap
    axis.set_xscale("log")
    axis.set_xlim(left, right * (right / left) ** 0.3)  # room for the ratio
    axis.set_ylim(len(names) - 0.4, -0.6)
    for place, name in enumerate(names):
        row = problem.row(name)
        if row["status"] == "ok":
            value = problem.milliseconds(name)
            axis.barh(place, value - left, left=left, color=_color(name, problem), height=0.7)
            low, high = row["ms"]["p20"], row["ms"]["p80"]
            axis.plot([low, high], [place, place], color="black", linewidth=1)
            text = f"{number(value)} ms" if name == problem.ours else problem.times_ours(name)
            axis.text(max(value, high) * 1.1, place, text, va="center", fontsize=8)
        else:
            axis.text(left * 1.1, place, "out of memory", va="center", fontsize=8, color="tab:red")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    both = "forward and backward" if problem.mode == "full" else "forward"
    axis.set_xlabel(f"ms, {both}", fontsize=8)
    axis.set_title(f"{problem.sizes}, {problem.dtype}", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    axis.tick_params(axis="x", labelsize=8)
    axis.xaxis.set_minor_formatter(NullFormatter())


def plot_memory(problems: Sequence[BenchmarkProblem], path: Path) -> Path:
    """A line per provider over the batch; where it ran out of memory, a cross above."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    lines = _batches(problems)
    names = list(dict.fromkeys(name for line in lines for problem in line for name in _shown(problem)))
    values = [
        row["peak_mb"]
        for line in lines
        for problem in line
        for name in _shown(problem)
        if (row := problem.row(name))["status"] == "ok" and row["peak_mb"]
    ]
    ceiling = 4 * max(values, default=1)
    for index, name in enumerate(names):
        for part, line in enumerate(lines):
            rows = [(p.shape["batch"], p.row(name)) for p in line if name in p.rows]
            points = [
                (batch, row["peak_mb"]) for batch, row in rows if row["status"] == "ok" and row["peak_mb"]
            ]
            color, label = f"C{index}", None if part else name
            axis.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=color, label=label)
            lost = [batch for batch, row in rows if row["status"] == "oom"]
            # Side by side, where several are lost at the same batch.
            axis.plot([b * 1.06 ** (index - 1) for b in lost], [ceiling] * len(lost), "x", color=color)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    batches = sorted({problem.shape["batch"] for line in lines for problem in line})
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    axis.axhline(ceiling, color="grey", linewidth=0.6)
    axis.text(batches[0], ceiling * 1.15, "out of memory", fontsize=8, color="grey")
    axis.set_ylim(top=ceiling * 2)
    axis.set_xlabel("batch, pairs")
    axis.set_ylabel("peak memory beyond the inputs, MiB")
    axis.set_title(problems[0].op.replace("_", " "), fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _shown(problem: BenchmarkProblem) -> list[str]:
    """The providers that were timed or ran out of memory."""
    return [name for name in problem.rows if problem.row(name)["status"] != "unavailable"]


def _batches(problems: Sequence[BenchmarkProblem]) -> list[list[BenchmarkProblem]]:
    """Groups of problems that differ in the batch alone; those with one batch are left out."""
    groups: dict[str, list[BenchmarkProblem]] = {}
    for problem in problems:
        if "batch" in problem.shape:
            rest = {name: size for name, size in problem.shape.items() if name != "batch"}
            groups.setdefault(json.dumps([rest, problem.dtype]), []).append(problem)
    return [group for group in groups.values() if len(group) > 2]


def _color(name: str, problem: BenchmarkProblem) -> str:
    if name == problem.ours:
        return "tab:green"
    if name in BACKENDS:
        return "#9fd29f"
    return "tab:gray" if name == "eager_padded" else "tab:blue"
