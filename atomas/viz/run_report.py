"""A whole run on one HTML page that needs nothing but itself: losses, recall, speed, and where the seconds go."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atomas.viz.training_curves import running_mean

_Records = Sequence[Mapping[str, Any]]

LINES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "losses", "nats", "train",
        {"loss/global": "global", "loss/hierarchical": "hierarchical", "loss/lm": "generation"},
    ),
    (
        "recall at 1 in the batch", "share", "train",
        {
            "recall/text_to_smiles": "global, text to molecule", "recall/smiles_to_text": "global, molecule to text",
            "recall/level_0": "tokens", "recall/level_1": "fragments", "recall/level_2": "molecule",
        },
    ),
    (
        "validation", "share", "validation",
        {
            "text_to_molecule/recall_at_1": "R@1, text to molecule",
            "molecule_to_text/recall_at_1": "R@1, molecule to text",
        },
    ),
    ("pairs a second", "1/s", "train", {"pairs_per_second": "all ranks"}),
    ("share of the devices' peak FLOP/s", "share", "train", {"mfu": "MFU", "hfu": "HFU"}),
    ("gradient norm", "", "train", {"gradient_norm": "before clipping"}),
)  # fmt: skip
"""Panels: title, unit, kind of record, and its keys with their names for people."""

_FEW = 60

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
th, td { text-align: left; padding: .2rem .8rem; border-bottom: 1px solid #eee; }
td + td { text-align: right; font-variant-numeric: tabular-nums; }
"""


def write_run_report(records: _Records, environment: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Write the page from the records of `read_metrics`, one of kind `train` at least, and an attempt's `env.json`."""
    path.write_text("\n".join(_page(records, environment, title)) + "\n", encoding="utf-8")


def step_split(records: _Records) -> dict[str, NDArray[np.float64]]:
    """Seconds of every training step in each phase, in the order of a step; phases that take no time are left out."""
    steps = [record for record in records if record["kind"] == "train"]
    names = [key for key in steps[0] if key.startswith("seconds/") and key != "seconds/data_max"]
    split = {name.removeprefix("seconds/"): np.array([s.get(name, 0.0) for s in steps]) for name in names}
    return {name: seconds for name, seconds in split.items() if seconds.any()}


def _page(records: _Records, environment: Mapping[str, Any], title: str) -> Iterator[str]:
    steps = [record for record in records if record["kind"] == "train"]
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>'
    yield f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>"
    ranks, device = environment.get("world_size"), environment.get("device_name")
    yield f"<p>{len(steps)} steps to step {steps[-1]['step']}; {ranks} ranks on {escape(str(device))}</p>"
    yield _svg(records)
    yield "<h2>A step</h2>\n<p>Median over the steps</p>\n<table>"
    for key, form in (
        ("pairs_per_second", "{:,.1f} pairs/s"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("padding_fraction", "{:.1%}"),
        ("mfu", "{:.1%}"),
        ("hfu", "{:.1%}"),
        ("peak_memory_mb", "{:,.0f} MiB"),
        ("step_seconds", "{:.3f} s"),
    ):
        value = float(np.median([step[key] for step in steps]))
        yield f"<tr><td>{key.replace('_', ' ')}</td><td>{form.format(value)}</td></tr>"
    yield "</table>\n<h2>Where its seconds go</h2>\n<p>Mean over the steps</p>\n<table>"
    split = {name: float(seconds.mean()) for name, seconds in step_split(records).items()}
    for name, seconds in sorted(split.items(), key=lambda item: -item[1]):
        share = seconds / sum(split.values())
        yield f"<tr><td>{escape(name)}</td><td>{seconds:.4f} s</td><td>{share:.1%}</td></tr>"
    yield "</table>\n</body>\n</html>"


def _svg(records: _Records) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 10), layout="constrained")
    grid = figure.add_gridspec(3, 3, height_ratios=(1, 1, 1.2))
    for place, (title, unit, kind, keys) in enumerate(LINES):
        axis = figure.add_subplot(grid[divmod(place, 3)])
        _draw_lines(axis, [record for record in records if record["kind"] == kind], keys)
        axis.set(title=title, xlabel="step", ylabel=unit)
    _draw_split(figure.add_subplot(grid[2, :]), records)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)


def _draw_lines(axis: Any, records: _Records, keys: Mapping[str, str]) -> None:
    """A few points as they are, many pale under their running mean."""
    drawn = [(key, name) for key, name in keys.items() if any(key in record for record in records)]
    for number, (key, name) in enumerate(drawn):
        points = [(record["step"], record[key]) for record in records if key in record]
        steps, values = np.array(points, dtype=float).T
        if len(steps) < _FEW:
            axis.plot(steps, values, color=f"C{number}", marker=".", label=name)
        else:
            axis.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=0.8)
            axis.plot(steps, running_mean(values), color=f"C{number}", label=name)
    axis.grid(alpha=0.3)
    if drawn:
        axis.legend(fontsize=7, frameon=False)
    else:
        axis.text(0.5, 0.5, "not part of this run", ha="center", transform=axis.transAxes, color="grey")


def _draw_split(axis: Any, records: _Records) -> None:
    import matplotlib

    steps = [record["step"] for record in records if record["kind"] == "train"]
    split = step_split(records)
    colors = matplotlib.colormaps["tab20"](np.arange(len(split)))
    axis.stackplot(
        steps, [running_mean(seconds) for seconds in split.values()], labels=list(split), colors=colors
    )
    axis.set(title="a step by phase, running mean", xlabel="step", ylabel="seconds")
    axis.margins(x=0)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
