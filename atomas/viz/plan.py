"""`atomas plan` as a picture: time of a step, pairs per second and bytes sent over 1 to 1,024 GPUs."""

from pathlib import Path
from typing import Any

EXCHANGE_COLORS = {"allgather": "C0", "ring": "C1"}


def plot_plan(report: dict[str, Any], path: Path) -> None:
    """Draw the scaling curves of a report into `path` (PNG, SVG or PDF by its ending)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time, throughput, sent) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for exchange, steps in report["scaling"].items():
        gpus = [step["gpus"] for step in steps]
        style: dict[str, Any] = {"color": EXCHANGE_COLORS[exchange], "marker": "o", "markersize": 3}
        seconds = [[1000 * step[key] for step in steps] for key in ("compute_seconds", "step_seconds")]
        if exchange == "allgather":
            time.plot(gpus, seconds[0], color="grey", linestyle="--", label="computation alone")
        time.plot(gpus, seconds[1], label=exchange, **style)
        throughput.plot(gpus, [step["pairs_per_second"] for step in steps], label=exchange, **style)
        sent.plot(gpus[1:], [step["sent_bytes"] / 1e9 for step in steps[1:]], label=exchange, **style)
    first = report["scaling"]["allgather"][0]
    gpus = [step["gpus"] for step in report["scaling"]["allgather"]]
    ideal = [count * first["pairs_per_second"] for count in gpus]
    throughput.plot(gpus, ideal, color="grey", linestyle=":", label="linear")
    titles = ("time of a step, ms", "pairs per second, all GPUs", "sent by one GPU in a step, GB")
    for axis, title in zip((time, throughput, sent), titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("GPUs")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"{first['pairs_per_gpu']} pairs on each {report['cluster']['gpu']}, ZeRO {first['zero_stage']} (planned)"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plan_tables(report: dict[str, Any]) -> str:
    """Markdown: memory by component, and one step, for every ZeRO stage."""
    cluster, workload = report["cluster"], report["workload"]
    steps = report["steps"]
    memory = [step["memory"] for step in steps["allgather"]]
    tokens = workload["mean_tokens"]
    lines = [
        f"{cluster['nodes']} x {cluster['gpus_per_node']} {cluster['gpu'].upper()}, {workload['precision']}, "
        f"{workload['pairs_per_gpu']} pairs of {tokens['text']:.0f} text and {tokens['smiles']:.0f} SMILES tokens on "
        f"each, B = {workload['batch']:,}. Memory of one GPU in GB, `allgather`:",
        "",
        "| component | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 | held |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name in dict.fromkeys(name for plan in memory for name in plan["components"]):
        found = [plan["components"].get(name) for plan in memory]
        held = next(part["held"] for part in found if part)
        cells = " | ".join("-" if part is None else f"{part['bytes'] / 1e9:.2f}" for part in found)
        lines.append(f"| {name} | {cells} | {held} |")
    peaks = " | ".join(f"{plan['peak_bytes'] / 1e9:.2f}" for plan in memory)
    lines += [
        f"| **most at once** | {peaks} | |",
        "",
        "| exchange, ZeRO | computation, ms | communication, ms | not hidden, ms | sent, GB | pairs/s | largest b |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for exchange, plans in steps.items():
        for step, largest in zip(plans, report["largest_pairs_per_gpu"][exchange], strict=True):
            times = ("compute_seconds", "communication_seconds", "exposed_communication_seconds")
            cells = " | ".join(f"{1000 * step[key]:,.1f}" for key in times)
            lines.append(
                f"| {exchange}, {step['zero_stage']} | {cells} | {step['sent_bytes'] / 1e9:.2f} | "
                f"{step['pairs_per_second']:,.0f} | {largest:,} |"
            )
    return "\n".join(lines)
