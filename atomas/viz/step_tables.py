"""Markdown tables of reports of `atomas bench step`."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from atomas.viz.kernel_tables import number

PUBLISHED, HEADS, OURS = "published", "path:losses", "ours"

Row = Mapping[str, Any]


def step_tables(report: Mapping[str, Any]) -> str:
    """What a report holds: providers side by side, or weak scaling."""
    scaling = len({row["ranks"] for row in report["rows"]}) > 1
    return scaling_table(report) if scaling else step_table(report)


def step_table(report: Mapping[str, Any]) -> str:
    """The published form and ours, the way from one to the other, and ours with one thing switched off."""
    rows = {row["provider"]: row for row in report["rows"] if row["ranks"] == 1}
    parts = [_end_table(rows), _path_table(rows), _variant_table(rows), _phase_table(rows)]
    return "\n\n".join([*(part for part in parts if part), _footnote(report)])


def scaling_table(report: Mapping[str, Any]) -> str:
    """Weak scaling: the same number of pairs on each of more and more ranks."""
    rows = [row for row in report["rows"] if row["provider"] == OURS and row["status"] == "ok"]
    lines = [
        "| ranks | pairs of all | step, s | pairs/s | per rank, of one | CPU seconds of a rank | its peak, MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    alone = next((row["pairs_per_s"] for row in rows if row["ranks"] == 1), None)
    for row in rows:
        share = "-" if alone is None else f"{100 * row['pairs_per_s'] / row['ranks'] / alone:.0f} %"
        lines.append(
            f"| {row['ranks']} | {row['ranks'] * row['batch']} | {number(row['step_seconds']['p50'])} | "
            f"{number(row['pairs_per_s'])} | {share} | {number(row['cpu_seconds']['p50'])} | {number(row['peak_mb'])} |"
        )
    return "\n".join([*lines, "", _footnote(report)])


def path_rows(rows: Mapping[str, Row]) -> list[tuple[str, Row]]:
    """Label and row of each step from the published form to ours that was measured."""
    path = [(row["description"], row) for name, row in rows.items() if name.startswith("path:")]
    labelled = [(label if row["provider"] == HEADS else f"+ {label}", row) for label, row in path]
    if PUBLISHED in rows:
        labelled.insert(0, ("published form", rows[PUBLISHED]))
    if OURS in rows:
        labelled.append((f"+ {rows[OURS]['description']}: ours", rows[OURS]))
    return labelled


def variant_rows(rows: Mapping[str, Row]) -> list[tuple[str, Row]]:
    """Label and row of each of ours with one thing switched off, or one option switched on."""
    variants = [
        (name.partition(":"), row) for name, row in rows.items() if name.startswith(("without:", "with:"))
    ]
    return [(f"{kind} {name}: {row['description']}", row) for (kind, _, name), row in variants]


def _end_table(rows: Mapping[str, Row]) -> str:
    lines = [
        "| | step, s | on cores, s | pairs/s | tokens/s | MFU | peak, MiB | pairs/s of the published |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = rows.get(PUBLISHED)
    for name in (PUBLISHED, OURS):
        if name in rows:
            lines.append(_line(name, rows[name], base))
    return "\n".join(lines)


def _line(label: str, row: Row, base: Row | None) -> str:
    if row["status"] != "ok":
        return f"| {label} | {_failure(row)} |" + " |" * 6
    ratio = "-"
    if base is not None and base["status"] == "ok":
        ratio = f"{row['pairs_per_s'] / base['pairs_per_s']:.1f} x"
    return (
        f"| {label} | {number(row['step_seconds']['p50'])} | {number(row['cpu_seconds']['p50'])} | "
        f"{number(row['pairs_per_s'])} | {number(row['tokens_per_s'])} | {100 * row['mfu']:.1f} % | "
        f"{number(row['peak_mb'])} | {ratio} |"
    )


def _path_table(rows: Mapping[str, Row]) -> str:
    path = path_rows(rows)
    if len(path) < 3:
        return ""
    lines = [
        "| from the published form to ours | step, s | on cores, s | times faster than the line above | peak, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    before: Row | None = None
    for label, row in path:
        if row["status"] != "ok":
            lines.append(f"| {label} | {_failure(row)} | | | |")
            continue
        gain = "" if before is None else f"{before['step_seconds']['p50'] / row['step_seconds']['p50']:.2f} x"
        lines.append(
            f"| {label} | {number(row['step_seconds']['p50'])} | {number(row['cpu_seconds']['p50'])} | {gain} | "
            f"{number(row['peak_mb'])} |"
        )
        before = row
    return "\n".join(lines)


def _variant_table(rows: Mapping[str, Row]) -> str:
    variants, ours = variant_rows(rows), rows.get(OURS)
    if not variants or ours is None or ours["status"] != "ok":
        return ""
    lines = [
        "| ours | step, s | times ours | peak, MiB | beyond ours, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for label, row in variants:
        if row["status"] != "ok":
            lines.append(f"| {label} | {_failure(row)} | | | |")
            continue
        ratio = row["step_seconds"]["p50"] / ours["step_seconds"]["p50"]
        lines.append(
            f"| {label} | {number(row['step_seconds']['p50'])} | {ratio:.2f} x | {number(row['peak_mb'])} | "
            f"{row['peak_mb'] - ours['peak_mb']:+,.0f} |"
        )
    return "\n".join(lines)


def _phase_table(rows: Mapping[str, Row]) -> str:
    """Where the seconds of our step go; a phase's own time, without those inside it."""
    ours = rows.get(OURS)
    if ours is None or ours["status"] != "ok":
        return ""
    phases = {name: value for name, value in ours["phases"].items() if value > 0}
    total = sum(phases.values())
    lines = ["| phase of our step | seconds | share |", "|---|---:|---:|"]
    lines += [f"| {name} | {number(value)} | {100 * value / total:.0f} % |" for name, value in phases.items()]
    return "\n".join(lines)


def threads_of(row: Row) -> str:
    """CPU threads of a process, for people."""
    return f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"


def _failure(row: Row) -> str:
    return "out of memory" if row["status"] == "oom" else str(row["reason"])


def _footnote(report: Mapping[str, Any]) -> str:
    machine, rows = report["machine"], report["rows"]
    first = rows[0]
    where = machine["gpu"] or f"{machine['processor']} ({machine['instruction_set']}), {threads_of(first)}"
    lengths = {
        side: mean(first["lengths"][side]) / (first["batch"] * first["ranks"]) for side in ("text", "smiles")
    }
    return (
        f"{report['preset']}, {first['batch']} pairs a rank of {report['pairs']}: {lengths['text']:.0f} text and "
        f"{lengths['smiles']:.0f} SMILES tokens in the mean, dropout {report['dropout']}. {where}, {first['dtype']}, "
        f'torch {report["versions"]["torch"]}, load average {machine["load"]}. Medians of whole steps; "on cores" is '
        "the CPU time of the process, which the load of others does not lengthen as much. At full length ours and the "
        f"published form differ by {report['same_loss']['deviation']:.0e} in the losses."
    )
