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
