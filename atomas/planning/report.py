"""What `atomas plan` prints and writes: one dictionary, and its tables as text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from atomas.planning.hardware import Assumptions, Cluster
from atomas.planning.memory import ZERO_STAGES, MemoryPlan
from atomas.planning.model import (
    EXCHANGES,
    communication_bound,
    largest_pairs,
    plan_step,
    scaling,
    with_exchange,
)
from atomas.planning.workload import Workload


def plan_report(
    work: Workload, cluster: Cluster, assumed: Assumptions, *, gpu_name: str
) -> tuple[dict[str, Any], str]:
    """The plan of `work` on `cluster` for every ZeRO stage and both exchanges, as JSON values and as text."""
    works = {exchange: with_exchange(work, exchange) for exchange in EXCHANGES}
    steps = {
        exchange: [plan_step(own, stage, cluster, assumed) for stage in ZERO_STAGES]
        for exchange, own in works.items()
    }
    usable = cluster.gpu.memory_bytes * assumed.usable_memory_fraction
    largest = {
        exchange: [largest_pairs(own, stage, usable) for stage in ZERO_STAGES]
        for exchange, own in works.items()
    }
    stage = work.config.deepspeed.zero_stage
    curves = {exchange: scaling(own, stage, cluster, assumed) for exchange, own in works.items()}
    bounds = {exchange: communication_bound(curve) for exchange, curve in curves.items()}
    report = {
        "cluster": {
            "gpu": gpu_name,
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "link_bytes_per_second": cluster.link_bytes_per_second,
            **dataclasses.asdict(cluster.gpu),
        },
        "assumptions": dataclasses.asdict(assumed),
        "workload": {
            "pairs_per_gpu": work.pairs,
            "batch": work.batch,
            "mean_tokens": work.tokens,
            "parameters": dataclasses.asdict(work.parameters),
            "precision": work.config.training.precision,
        },
        "steps": {exchange: [step.as_dict() for step in own] for exchange, own in steps.items()},
        "largest_pairs_per_gpu": largest,
        "scaling": {exchange: [step.as_dict() for step in curve] for exchange, curve in curves.items()},
        "communication_bound_from_gpus": bounds,
    }
    chosen = steps[work.config.loss.exchange]
    lines = [
        _heading(work, cluster, gpu_name),
        "",
        f"Memory of one GPU in GB, exchange {work.config.loss.exchange!r}",
        *_memory_table([step.memory for step in chosen]),
        "",
        f"One step of {work.pairs} pairs on each of {work.ranks} GPUs",
        *_time_table(steps, largest),
        "",
        *(_bound_line(exchange, bound, stage) for exchange, bound in bounds.items()),
        "",
        "Assumed: " + ", ".join(f"{key} {value:g}" for key, value in dataclasses.asdict(assumed).items()),
    ]
    return report, "\n".join(lines)


def _heading(work: Workload, cluster: Cluster, gpu_name: str) -> str:
    tokens = work.tokens
    return (
        f"{cluster.nodes} x {cluster.gpus_per_node} {gpu_name}, {work.parameters.total / 1e6:,.1f} M parameters "
        f"in {work.config.training.precision}, B = {work.batch:,} pairs of {tokens['text']:.0f} text and "
        f"{tokens['smiles']:.0f} SMILES tokens on average"
    )


_MARKS = {"device": "", "host": "*", "nvme": "°"}


def _memory_table(plans: Sequence[MemoryPlan]) -> list[str]:
    names = dict.fromkeys(component.name for plan in plans for component in plan.components)
    rows = []
    for name in names:
        cells = []
        held = ""
        for plan in plans:
            found = next((c for c in plan.components if c.name == name), None)
            held = held or (found.moment if found else "")
            cells.append("-" if found is None else f"{found.bytes / 1e9:.2f}" + _MARKS[found.place])
        rows.append([name, *cells, held])
    rows.append(["most at once", *(f"{plan.peak / 1e9:.2f}" for plan in plans), ""])
    lines = _columns([["", *(f"ZeRO {stage}" for stage in ZERO_STAGES), "held"], *rows])
    notes = {"*": "* on the host", "°": "° on NVMe"}
    return [*lines, *(note for mark, note in notes.items() if any(mark in line for line in lines))]


def _time_table(steps: Any, largest: Any) -> list[str]:
    header = ["", "compute", "communication", "exposed", "sent", "step", "pairs/s", "largest b that fits"]
    rows = [
        [
            f"{exchange}, ZeRO {step.stage}",
            _milliseconds(step.compute.seconds),
            _milliseconds(step.communication_seconds),
            _milliseconds(step.exposed_seconds),
            f"{step.communication.sent() / 1e9:.2f} GB",
            _milliseconds(step.seconds),
            f"{step.pairs_per_second:,.0f}",
            f"{largest[exchange][place]:,}",
        ]
        for exchange, own in steps.items()
        for place, step in enumerate(own)
    ]
    return _columns([header, *rows])


def _bound_line(exchange: str, bound: int | None, stage: int) -> str:
    place = "never up to 1,024 GPUs" if bound is None else f"from {bound:,} GPUs on"
    return f"Exposed communication takes longer than computation, {exchange}, ZeRO {stage}: {place}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
