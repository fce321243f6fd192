"""Tables in the documentation, rendered from the JSON that commands wrote: `python -m atomas.viz.tables`.

A page holds `<!-- NAME -->` and `<!-- /NAME -->`; what stands between is replaced by a table of the
retrieval reports in `docs/results/NAME/`, one per run, or of the operator benchmark
`docs/results/NAME.json`, or, for NAME_memory, of the memory in it; step-NAME stands for the step benchmark
`docs/results/step/NAME.json`, faults for the suite of faults, distributed-NAME and plan-NAME for those in
`docs/results/distributed/`. `--check` only compares.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atomas.viz.data_benchmark import loader_memory_table, throughput_table
from atomas.viz.distributed_benchmark import distributed_tables
from atomas.viz.kernel_tables import benchmark_table, memory_table
from atomas.viz.plan import plan_tables
from atomas.viz.step_tables import step_tables

PAGES = (
    "README.md",
    "docs/data.md",
    "docs/kernels.md",
    "docs/distributed.md",
    "docs/training.md",
    "docs/step.md",
    "docs/reliability.md",
    "docs/results/README.md",
)
RESULTS = Path("docs/results")


def main() -> None:
    """Rewrite the tables of all pages, or say which one is out of date."""
    parser = argparse.ArgumentParser(
        description="Render the tables of the documentation from docs/results/*.json."
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 where a page is out of date"
    )
    check = parser.parse_args().check
    stale = []
    for name in PAGES:
        page = Path(name)
        old = page.read_text(encoding="utf-8")
        new = render_page(old, RESULTS)
        if new != old:
            stale.append(name)
            if not check:
                page.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'out of date' if check else 'rewritten'}")
    sys.exit(1 if check and stale else 0)


def render_page(text: str, results: Path) -> str:
    """The page with every marked table replaced by the one of `results/NAME.json`."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name.startswith("step-"):
            table = step_tables(_read(results / "step" / f"{name.removeprefix('step-')}.json"))
        elif name == "momentum_forward":
            table = momentum_forward_table(_read(results / f"{name}.json"))
        elif name == "faults":
            table = fault_table(_read(results / "faults.json"))
        elif name == "checkpoint_stall":
            table = checkpoint_stall_table(_read(results / f"{name}.json"))
        elif name == "data-build":
            table = data_build_table(_read(results / "data" / "build.json"))
        elif name == "batch-size":
            table = batch_size_table(_read(results / "distributed" / "batch_size.json"))
        elif name == "data-throughput":
            table = throughput_table(_read(results / "data" / "throughput.json"))
        elif name == "data-memory":
            table = loader_memory_table(_read(results / "data" / "memory.json"))
        elif name.startswith("distributed-"):
            table = distributed_tables(
                _read(results / "distributed" / f"{name.removeprefix('distributed-')}.json")
            )
        elif name.startswith("plan-"):
            table = plan_tables(_read(results / "distributed" / f"plan_{name.removeprefix('plan-')}.json"))
        elif (results / name).is_dir():
            files = sorted((results / name).glob("*.json"))
            table = retrieval_table({file.stem: _read(file) for file in files})
        elif name.endswith("_memory"):
            table = memory_table(_read(results / f"{name.removesuffix('_memory')}.json"))
        else:
            table = benchmark_table(_read(results / f"{name}.json"))
        return f"<!-- {name} -->\n{table}\n<!-- /{name} -->"

    return re.sub(r"<!-- ([a-z0-9_-]+) -->\n.*?<!-- /\1 -->", replace, text, flags=re.DOTALL)


def retrieval_table(reports: Mapping[str, dict[str, Any]]) -> str:
    """Markdown of reports of `atomas evaluate retrieval`, by the name of the run."""
    lines = [
        "| run | steps | score | text to molecule R@1 | R@10 | median rank | molecule to text R@1 | R@10 |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for name, report in reports.items():
        for score, directions in report["metrics"].items():
            forth, back = directions["text_to_molecule"], directions["molecule_to_text"]
            lines.append(
                f"| {name} | {report['step']} | {score} | {_percent(forth['recall_at_1'])} | "
                f"{_percent(forth['recall_at_10'])} | {forth['median_rank']:g} | "
                f"{_percent(back['recall_at_1'])} | {_percent(back['recall_at_10'])} |"
            )
    counts = sorted({report["pairs"] for report in reports.values()})
    chance = ", ".join(f"{count} held-out pairs: chance is {_percent(1 / count)}" for count in counts)
    return "\n".join([*lines, "", f"{chance} R@1."])


def batch_size_table(report: Mapping[str, Any]) -> str:
    """Markdown of a report of `atomas bench batch-size`."""
    lines = ["| B | pairs at once | step needs, MiB | seconds |", "|---:|---:|---:|---:|"]
    lines += [
        f"| {row['batch']:,} | {row['micro_batch']:,} | {row['peak_mb']:,.0f} | {row['seconds']:,.1f} |"
        for row in report["rows"]
    ]
    return "\n".join(lines)


def data_build_table(report: Mapping[str, Any]) -> str:
    """Markdown of a report of `atomas bench data-build`."""
    costs = ("rdkit", "read", "text", "keys", "encode", "rest")
    rows = report["rows"]
    lines = [
        "| source | identity | RDKit alone, rows/s | examine, rows/s | of RDKit | "
        + " | ".join(f"{name}, us" for name in costs)
        + " |",
        "|---|---|---:|---:|---:|" + "---:|" * len(costs),
    ]
    lines += [
        f"| {row['source']} | {row['identity']} | {row['rdkit_rows_per_s']:,.0f} | {row['examine_rows_per_s']:,.0f} | "
        f"{row['share_of_rdkit']:.0%} | "
        + " | ".join(f"{row['microseconds'][name]:,.0f}" for name in costs)
        + " |"
        for row in rows
        if row["kind"] == "examine"
    ]
    builds = [row for row in rows if row["kind"] == "build"]
    if not builds:
        return "\n".join(lines)
    stages = ("scan", "examine", "resolve", "write")
    lines += [
        "",
        "| source | identity | processes | rows | build, s | rows/s a core | RDKit alone | of RDKit | "
        + " | ".join(f"{name}, s" for name in stages)
        + " |",
        "|---|---|---:|---:|---:|---:|---:|---:|" + "---:|" * len(stages),
    ]
    lines += [
        f"| {row['source']} | {row['identity']} | {row['workers']} | {row['rows']:,} | {row['seconds']:.1f} | "
        f"{row['rows_per_s_per_core']:,.0f} | {row['rdkit_rows_per_s_per_core']:,.0f} | {row['share_of_rdkit']:.0%} | "
        + " | ".join(f"{row['stages'][name]:.1f}" for name in stages)
        + " |"
        for row in builds
    ]
    return "\n".join(lines)


def fault_table(report: Mapping[str, Any]) -> str:
    """Markdown of a report of `python -m tests.faults`: a row per fault, then how it was made."""
    lines = [
        "| fault | what happened | started with | started again by | steps lost | s to notice | s to train again |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    untold = []
    for name, row in report["faults"].items():
        if row["result"] == "skipped":
            untold.append(f"{name} ({row['why']})")
            continue
        if row["result"] == "failed":
            lines.append(f"| {name} | **did not go on as it should** | | | | | |")
            continue
        happened = row["happened"].replace("|", "\\|")
        lines.append(
            f"| {name} | {happened} | {row['start']} | {row['again']} | {row['steps_lost']} | "
            f"{row['detect_seconds']:.0f} | {row['resume_seconds']:.0f} |"
        )
    worst = max((row["deviation"] for row in report["faults"].values() if "deviation" in row), default=0.0)
    told = (
        f"Largest relative difference of any loss from the undisturbed run's: {worst:g}. {report['ranks']} ranks, "
        f"{report['steps']} steps, a checkpoint every {report['checkpoint_every']}, "
        f"run.silence_timeout_seconds = {report['silence_timeout_seconds']}; {report['host']}, {report['date']}."
    )
    if untold:
        told += f" Not played there: {'; '.join(untold)}."
    return "\n".join([*lines, "", told])


def checkpoint_stall_table(report: Mapping[str, Any]) -> str:
    """Markdown of a report of `atomas.benchmarks.checkpoint_stall`."""
    lines = [
        "| checkpoint.asynchronous | training waits | published after | a step | a step beside the writing |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        beside = row["step_seconds_beside"]
        lines.append(
            f"| {str(row['asynchronous']).lower()} | {row['stalled_seconds']:.2f} s | "
            f"{row['published_after_seconds']:.2f} s | {row['step_seconds']:.2f} s | "
            f"{'' if beside is None else f'{beside:.2f} s'} |"
        )
    size = report["rows"][0]["checkpoint_bytes"] / 2**20
    loads = " and ".join(f"{row['load']:.0f}" for row in report["rows"])
    told = f"A checkpoint of {size:.0f} MiB, one rank on one CPU thread; load average of the machine {loads}."
    return "\n".join([*lines, "", told])


def momentum_forward_table(report: Mapping[str, Any]) -> str:
    """Markdown of a report of `atomas.benchmarks.momentum_forward`."""
    lines = [
        "| precision | momentum.forward | weights and masters per rank | sent per step and rank | update | features |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['precision']} | {row['forward']} | {row['held_bytes'] / row['parameters']:.1f} bytes / parameter | "
        f"{row['sent_bytes_per_step'] / row['parameters']:.2f} bytes / parameter | {row['update_seconds']:.2f} s | "
        f"{row['forward_seconds']:.2f} s |"
        for row in report["rows"]
    ]
    parameters = report["rows"][0]["parameters"]
    return "\n".join([*lines, "", f"{parameters / 1e6:.1f} million parameters, {report['ranks']} ranks."])


def _read(file: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
