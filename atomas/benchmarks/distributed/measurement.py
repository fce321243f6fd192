"""Time and bytes of every form on real processes of one machine, and on one device as if there were more ranks."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from atomas.benchmarks.distributed.forms import (
    FORMS,
    Pairs,
    build_alignment,
    global_batch,
    levels_of,
    loss_of,
)
from atomas.errors import AtomasError
from atomas.model.alignment import HierarchicalAlignment, Level, interaction
from atomas.phases import Collective, Observer, observed_by
from atomas.planning.communication import wire_factor
from atomas_kernels.bench.lengths import draw

Precision = Literal["bf16", "fp32"]

_SAME = 1e-5
"""Largest relative difference between the losses of two forms."""


@dataclass(frozen=True)
class Problem:
    """What every rank gets."""

    width: int
    pairs: int
    """b, of each rank"""
    runs: int
    """Timed after one that is not; the fastest counts"""
    threads: int
    precision: Precision
    """Of states and tokens"""
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """That of states and tokens."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class _Bytes(Observer):
    """What this rank sends, by the algorithms of gloo."""

    def __init__(self, ranks: int) -> None:
        self.sent, self._ranks = 0.0, ranks

    def collective(self, call: Collective) -> None:
        self.sent += call.payload_bytes * wire_factor(call.kind, self._ranks, "gloo")


def draw_pairs(problem: Problem, rank: int, ranks: int) -> Pairs:
    """This rank's part of the states and lengths of all; lengths are like those of ChEBI-20."""
    own = slice(rank * problem.pairs, (rank + 1) * problem.pairs)
    lengths = [draw(modality, ranks * problem.pairs, seed=0)[own] for modality in ("text", "smiles")]
    generator = torch.Generator().manual_seed(1 + rank)
    states = [
        torch.randn(int(each.sum()), problem.width, generator=generator)
        .to(problem.device, problem.dtype)
        .requires_grad_()
        for each in lengths
    ]
    return Pairs(*states, *(each.to(problem.device) for each in lengths))


def measure_ranks(problem: Problem, ranks: int) -> list[dict[str, Any]]:
    """One row per form: means over the ranks.

    Raises:
        AtomasError: two forms have different losses.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(problem, ranks, folder), nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
    expected = rows[0]["loss"]
    for row in rows:
        if abs(row["loss"] - expected) > _SAME * abs(expected):
            raise AtomasError(f"{row['form']} has the loss {row['loss']}, {rows[0]['form']} has {expected}")
    return rows


def _rank(rank: int, problem: Problem, ranks: int, folder: str) -> None:
    torch.set_num_threads(problem.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        rows = [_measure(form, problem, rank, ranks) for form in FORMS]
        if rank == 0:
            (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def _measure(form: str, problem: Problem, rank: int, ranks: int) -> dict[str, Any]:
    alignment, pairs = build_alignment(form, problem.width), draw_pairs(problem, rank, ranks)
    everyone = global_batch(pairs)
    fastest = [float("inf"), float("inf")]
    sent = loss = 0.0
    for run in range(1 + problem.runs):
        dist.barrier()
        observer = _Bytes(ranks)
        started = time.perf_counter(), time.process_time()
        with observed_by(observer):
            value = loss_of(form, alignment, pairs, everyone)
            value.backward()
        taken = time.perf_counter() - started[0], time.process_time() - started[1]
        if run:
            fastest = [min(pair) for pair in zip(fastest, taken, strict=True)]
        sent, loss = observer.sent, float(value.detach())
    means = torch.tensor([loss, sent, *fastest], dtype=torch.float64)
    dist.all_reduce(means)
    names = ("loss", "sent_bytes", "seconds", "cpu_seconds")
    return {"form": form, "ranks": ranks, **dict(zip(names, (means / ranks).tolist(), strict=True))}


def measure_as_if(problem: Problem, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Clustering and token interaction of one rank on one device, with tokens of the other ranks that are made up.

    Nothing is sent. A form that runs out of memory has `status` "out of memory".
    """
    return [_as_if(form, problem, count) for count in ranks for form in FORMS if form != "ring"]


def _as_if(form: str, problem: Problem, ranks: int) -> dict[str, Any]:
    alignment = build_alignment(form, problem.width).to(problem.device)
    own = draw_pairs(problem, 0, ranks)
    row: dict[str, Any] = {"form": form, "as_if_ranks": ranks, "status": "ok"}
    device = torch.device(problem.device)
    try:
        everyone = (
            own
            if ranks == 1
            else draw_pairs(Problem(**asdict(problem) | {"pairs": ranks * problem.pairs}), 0, 1)
        )
        fastest = float("inf")
        for run in range(1 + problem.runs):
            started = _now(device)
            _block(form, alignment, own, everyone).backward()
            if run:
                fastest = min(fastest, _now(device) - started)
        row["seconds"] = fastest
    except torch.OutOfMemoryError:
        row["status"] = "out of memory"
    return row


def _block(form: str, alignment: HierarchicalAlignment, own: Pairs, everyone: Pairs) -> torch.Tensor:
    """The sum of the scores that one rank computes; the levels of others are made without gradient."""
    if form == "gather_everything":
        text, smiles = levels_of(alignment, everyone)
        return torch.stack([interaction(*each).sum() for each in zip(text, smiles, strict=True)]).sum()
    text, smiles = levels_of(alignment, own)
    with torch.no_grad():
        all_text, all_smiles = levels_of(alignment, everyone)
    scores = [interaction(*each).sum() for each in zip(text, map(_leaf, all_smiles), strict=True)]
    if form == "local_loss":
        scores += [interaction(*each).sum() for each in zip(smiles, map(_leaf, all_text), strict=True)]
    return torch.stack(scores).sum()


def _leaf(level: Level) -> Level:
    """Tokens of others, whose gradient is wanted as well."""
    return level._replace(tokens=level.tokens.detach().requires_grad_())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
