"""The training step as pictures and tables, from reports of `atomas bench step`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atomas.errors import AtomasError
from atomas.viz.kernel_tables import number
from atomas.viz.step_tables import OURS, Row, path_rows, step_tables, threads_of, variant_rows

_KEPT, _GAINED, _LOST = "tab:green", "#9fd29f", "tab:gray"


def render_step_report(report: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME.md and, where they were measured, NAME_waterfall.png and NAME_variants.png; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AtomasError(f"{folder} cannot be written: {error.strerror}") from error
    table = folder / f"{name}.md"
    table.write_text(step_tables(report) + "\n", encoding="utf-8")
    paths = [table]
    rows = {row["provider"]: row for row in report["rows"] if row["ranks"] == 1 and row["status"] == "ok"}
    if len(path := path_rows(rows)) > 2:
        paths.append(plot_waterfall(path, _title(report), folder / f"{name}_waterfall.png"))
    if OURS in rows and (variants := variant_rows(rows)):
        paths.append(plot_variants(rows[OURS], variants, _title(report), folder / f"{name}_variants.png"))
    return paths


def plot_waterfall(path: Sequence[tuple[str, Row]], title: str, file: Path) -> Path:
    """A bar for each step of the way: what is left of a step's time, and beyond it what was just gained."""
    import matplotlib.pyplot as plt

    figure, (times, memory) = plt.subplots(
        1, 2, figsize=(11, 1.4 + 0.36 * len(path)), sharey=True, layout="constrained", width_ratios=[3, 2]
    )
    seconds = [row["step_seconds"]["p50"] for _, row in path]
    left = min(seconds) / 2
    for place, ((_, row), value) in enumerate(zip(path, seconds, strict=True)):
        color = _LOST if place == 0 else _KEPT
        times.barh(place, value - left, left=left, color=color, height=0.7)
        before = seconds[place - 1] if place else value
        if before > value:
            times.barh(place, before - value, left=value, color=_GAINED, height=0.7)
        text = f"{number(value)} s" + (f"   {seconds[0] / value:.1f} x" if place else "")
        times.text(max(before, value) * 1.06, place, text, va="center", fontsize=8)
        memory.barh(place, row["peak_mb"] / 1024, color=color, height=0.7)
        memory.text(row["peak_mb"] / 1024, place, f"  {row['peak_mb'] / 1024:.2f}", va="center", fontsize=8)
    times.set_xscale("log")
    times.set_xlim(left, max(seconds) * 3)
    times.set_xlabel(
        "seconds of a step (pale: what this line saved), and times the published form's pairs/s", fontsize=8
    )
    memory.set_xlim(0, 1.2 * max(row["peak_mb"] / 1024 for _, row in path))
    memory.set_xlabel("peak memory of the process, GiB", fontsize=8)
    times.set_yticks(range(len(path)), [label for label, _ in path], fontsize=8)
    times.set_ylim(len(path) - 0.4, -0.6)
    _finish(figure, [times, memory], title, file)
    return file


def plot_variants(ours: Row, variants: Sequence[tuple[str, Row]], title: str, file: Path) -> Path:
    """A bar for each thing that was switched off or on alone: the time of a step in times of ours."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.3 + 0.36 * len(variants)), layout="constrained")
    base = ours["step_seconds"]["p50"]
    for place, (_, row) in enumerate(variants):
        found = row["step_seconds"]
        value = found["p50"] / base
        axis.barh(place, value - 1, left=1, color=_LOST if value > 1 else _GAINED, height=0.7)
        axis.plot([found["p20"] / base, found["p80"] / base], [place, place], color="black", linewidth=1)
        grown = row["peak_mb"] - ours["peak_mb"]
        right = max(value, 1, found["p80"] / base)
        axis.text(right, place, f"  {value:.2f} x, {grown:+,.0f} MiB", va="center", fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.3)
    axis.set_yticks(range(len(variants)), [label for label, _ in variants], fontsize=8)
    axis.set_ylim(len(variants) - 0.4, -0.6)
    axis.set_xlabel(f"time of a step with one thing changed; 1 is ours, {number(base)} s", fontsize=8)
    _finish(figure, [axis], title, file)
    return file


def _finish(figure: Any, axes: Sequence[Any], title: str, file: Path) -> None:
    import matplotlib.pyplot as plt

    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _title(report: Mapping[str, Any]) -> str:
    first, machine = report["rows"][0], report["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {threads_of(first)}"
    return f"one training step: {report['preset']}, {first['batch']} pairs, {first['dtype']}, {where}"
