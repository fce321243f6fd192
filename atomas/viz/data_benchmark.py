"""The data stream beside other libraries as a picture and a table, from reports of `atomas bench data`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atomas.errors import AtomasError

_TITLES = {"tokens": "already tokenized", "text": "tokenized on the way"}


def throughput_table(report: Mapping[str, Any]) -> str:
    """Markdown: a row for each library, pairs per second and processor time of both modes."""
    rows = {(row["op"], row["provider"]): row for row in report["rows"]}
    names = list(dict.fromkeys(row["provider"] for row in report["rows"]))
    lines = [
        "| | already tokenized: pairs per CPU second | pairs/s elapsed | CPU, us/pair "
        "| tokenized on the way: pairs per CPU second | pairs/s elapsed | CPU, us/pair |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    reasons = []
    for name in names:
        cells = []
        for mode in _TITLES:
            row = rows.get((mode, name))
            if row is None or row["status"] != "ok":
                cells += ["-", "-", "-"]
                if row is not None:
                    reasons.append(f"{name}, {_TITLES[mode]}: {row['reason']}.")
                continue
            own, others = row["own_cpu_us_per_pair"], row["worker_cpu_us_per_pair"]
            cells += [
                f"{row['pairs_per_cpu_second']:,.0f}",
                f"{row['pairs_per_second']['p50']:,.0f}",
                f"{own:.1f}" + (f" + {others:.1f} in the worker" if others else ""),
            ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{report['pairs']:,} pairs ({report['corpus']}), {report['tokens_per_pair']:.0f} tokens a pair, batches of "
        f"{report['rows'][0]['batch']}, one core of {report['machine']['processor']}. The load of its "
        f"{report['machine']['cores']} cores was {report['load_average']:.1f}: above that number of cores, elapsed "
        "rates are lower than those of a machine of one's own, and processor time is what compares.",
        *dict.fromkeys(reasons),
        "",
        "| `data.token_budget` | slots without a token: CPU | accelerator | padded to the longest |",
        "|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['token_budget']:,} | {row['cpu']:.1%} | {row['accelerator']:.1%} | {row['to_longest']:.1%} |"
        for row in report["padding"]
    ]
    return "\n".join(lines)


def render_data_report(report: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME.md and NAME.png; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AtomasError(f"{folder} cannot be written: {error.strerror}") from error
    table, picture = folder / f"{name}.md", folder / f"{name}.png"
    table.write_text(throughput_table(report) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    for axis, (mode, title) in zip(axes, _TITLES.items(), strict=True):
        rows = [row for row in report["rows"] if row["op"] == mode and row["status"] == "ok"]
        rows.sort(key=lambda row: -row["pairs_per_cpu_second"])
        for place, row in enumerate(rows):
            rate = row["pairs_per_cpu_second"]
            ours = row["provider"].startswith("atomas")
            axis.barh(place, rate, color="tab:green" if ours else "tab:gray", height=0.7)
            axis.text(rate, place, f"  {rate:,.0f}", va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), [row["provider"] for row in rows], fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlim(0, 1.2 * max((row["pairs_per_cpu_second"] for row in rows), default=1))
        axis.set_xlabel("pairs per second of processor time", fontsize=8)
        axis.set_title(title, fontsize=9)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return [table, picture]


def loader_memory_table(report: Mapping[str, Any]) -> str:
    """Markdown of a report of `atomas bench data-memory`."""
    rows, scale = report["rows"], report["scale"]
    marks = [rows[max(0, round(share * len(rows)) - 1)] for share in (0, 0.25, 0.5, 0.75, 1)]
    lines = ["| pairs streamed | loader, its own, MiB | loader, resident, MiB |", "|---:|---:|---:|"]
    lines += [
        f"| {row['pairs']:,} | {row['worker_own_mb']:.1f} | {row['worker_resident_mb']:.1f} |"
        for row in marks
    ]
    lines += [
        "",
        f"| of {scale['pairs']:,} pairs | MB | |",
        "|---|---:|---|",
        f"| index on disk | {scale['index_file_mb']:.0f} | |",
        f"| index held | {scale['index_mb']:.0f} | a rank and its loaders together; {scale['index_seconds']:.1f} s |",
        f"| order | {scale['order_mb']:.0f} | a rank and its loaders together; {scale['order_seconds']:.1f} s |",
        f"| lengths | {scale['lengths_mb']:.0f} | a file that all processes of a node map |",
    ]
    return "\n".join(lines)


def render_memory_report(report: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME.md and NAME.png; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table, picture = folder / f"{name}.md", folder / f"{name}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        table.write_text(loader_memory_table(report) + "\n", encoding="utf-8")
    except OSError as error:
        raise AtomasError(f"{folder} cannot be written: {error.strerror}") from error
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    pairs = [row["pairs"] / 1e6 for row in report["rows"]]
    for key, label in (("worker_resident_mb", "resident"), ("worker_own_mb", "its own")):
        axis.plot(pairs, [row[key] for row in report["rows"]], label=label)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("million pairs streamed")
    axis.set_ylabel("a loader process, MiB")
    axis.legend(fontsize=8)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return [table, picture]
