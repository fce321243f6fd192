"""Losses and retrieval over the steps of one or several runs, as one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PANELS: tuple[tuple[str, str, str], ...] = (
    ("train", "loss/global", "global contrast"),
    ("train", "loss/hierarchical", "hierarchical alignment"),
    ("train", "loss/lm", "generation"),
    ("validation", "text_to_molecule/recall_at_1", "validation R@1, text to molecule"),
)


def plot_training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw the records of `read_metrics` of each named run into `path` (PNG, SVG or PDF by its ending).

    Training losses are drawn as measured, pale, under their running mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(4.2 * len(PANELS), 3.6), layout="constrained")
    for axis, (kind, key, title) in zip(axes, PANELS, strict=True):
        drawn = False
        for number, (name, records) in enumerate(runs.items()):
            points = [(r["step"], r[key]) for r in records if r["kind"] == kind and key in r]
            if not points:
                continue
            drawn = True
            steps, values = np.array(points, dtype=float).T
            color = f"C{number}"
            if kind == "train":
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                axis.plot(steps, running_mean(values), color=color, label=name)
            else:
                axis.plot(steps, 100 * values, color=color, marker="o", markersize=3, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("%" if kind == "validation" else "nats")
        axis.grid(alpha=0.3)
        if drawn:
            axis.legend(fontsize=8, frameon=False)
        else:
            axis.text(0.5, 0.5, "not part of these runs", ha="center", transform=axis.transAxes, color="grey")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def running_mean(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Mean over a centred window of a thirtieth of the run, shorter at the ends."""
    half = max(1, len(values) // 60)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.minimum(np.arange(len(values)) + half + 1, len(values))
    starts = np.maximum(np.arange(len(values)) - half, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
