"""Tables and picture of a report of `atomas bench distributed`."""

from pathlib import Path
from typing import Any

NAMES = {
    "allgather": "ours, allgather",
    "ring": "ours, ring",
    "gather_everything": "gather everything (published)",
    "local_loss": "local loss (open_clip)",
}
_ON_PAPER = (1, 8, 64, 512, 1024)


def distributed_tables(report: dict[str, Any]) -> str:
    """Markdown: measured ratios to one rank of our own, one device, and paper."""
    problem, paper = report["problem"], report["paper"]
    measured = report["rows"]
    first = next(row for row in measured if row["form"] == "allgather")
    lines = [
        f"Measured with gloo, {problem['pairs']} pairs of width {problem['width']} in {problem['precision']} on each "
        f"rank, {problem['threads']} thread. Ratios are to {NAMES['allgather']} with {first['ranks']} rank.",
        "",
        "| ranks | form | work, GFLOP | ratio | CPU time, ms | ratio | sent, MB | planned, MB |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in measured:
        lines.append(
            f"| {row['ranks']} | {NAMES[row['form']]} | {row['flops'] / 1e9:.2f} | "
            f"{row['flops'] / first['flops']:.2f} | {1000 * row['cpu_seconds']:.0f} | "
            f"{row['cpu_seconds'] / first['cpu_seconds']:.2f} | {row['sent_bytes'] / 1e6:.2f} | "
            f"{row['planned_sent_bytes'] / 1e6:.2f} |"
        )
    if report["one_device"]:
        lines += ["", *_one_device(report)]
    lines += [
        "",
        f"On paper, {paper['pairs']} pairs of width {paper['width']} in {problem['precision']} on each "
        f"{paper['gpu'].upper()}.",
        "",
        "| GPUs | form | work, TFLOP | computation, ms | sent, GB | communication, ms |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in paper["rows"]:
        if row["ranks"] in _ON_PAPER:
            lines.append(
                f"| {row['ranks']:,} | {NAMES[row['form']]} | {row['flops'] / 1e12:,.2f} | "
                f"{1000 * row['compute_seconds']:,.1f} | {row['sent_bytes'] / 1e9:,.2f} | "
                f"{1000 * row['communication_seconds']:,.1f} |"
            )
    return "\n".join(lines)


def _one_device(report: dict[str, Any]) -> list[str]:
    lines = ["| as if ranks | form | time, ms |", "|---:|---|---:|"]
    for row in report["one_device"]:
        time = f"{1000 * row['seconds']:.1f}" if row["status"] == "ok" else row["status"]
        lines.append(f"| {row['as_if_ranks']} | {NAMES[row['form']]} | {time} |")
    return lines


def plot_distributed(report: dict[str, Any], path: Path) -> None:
    """Work, bytes and time of one rank against the number of ranks; measured points over the curves on paper."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    panels = (
        ("rows", "cpu_seconds", 1e3, "measured: CPU time of a rank, ms"),
        ("rows", "sent_bytes", 1e-6, "measured: sent by a rank, MB"),
        ("paper", "flops", 1e-12, "on paper: work of a rank, TFLOP"),
        ("paper", "sent_bytes", 1e-9, "on paper: sent by a rank, GB"),
    )
    for axis, (where, key, unit, title) in zip(axes, panels, strict=True):
        rows = report["rows"] if where == "rows" else report["paper"]["rows"]
        for number, (form, name) in enumerate(NAMES.items()):
            points = [(row["ranks"], unit * row[key]) for row in rows if row["form"] == form and row[key] > 0]
            if points:
                style = ":" if form == "ring" else "-"
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    marker="o",
                    markersize=3,
                    color=f"C{number}",
                    label=name,
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("ranks")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
