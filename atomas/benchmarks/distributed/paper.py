"""Work and bytes of every form on paper: counted FLOPs and planned traffic of one rank."""

from dataclasses import dataclass, replace
from typing import Any

from atomas.benchmarks.distributed.measurement import Precision, Problem
from atomas.config import Config, ModelConfig, TrainingConfig
from atomas.model.flops import PartFlops, count_step_flops
from atomas.planning.communication import Backend, Traffic, loss_traffic, token_traffic
from atomas.planning.compute import interaction_rate
from atomas.planning.hardware import Assumptions, Cluster
from atomas.planning.model import SWEEP, traffic_seconds, with_exchange
from atomas.planning.sizes import T5Sizes
from atomas.planning.workload import CHEBI20_MEAN, PairLengths, Workload


@dataclass(frozen=True)
class FormPlan:
    """One rank of one form."""

    flops: float
    """Of clustering, importance and token interaction, forward and backward, repetitions among them"""
    interaction_flops: float
    traffic: list[Traffic]
    ranks: int

    def sent(self, backend: Backend = "nccl") -> float:
        """Bytes that the rank sends."""
        return sum(item.sent(self.ranks, backend) for item in self.traffic)


def plan_form(form: str, work: Workload) -> FormPlan:
    """FLOPs and traffic of one rank under `forms.FORMS`."""
    exchanged = with_exchange(work, "ring" if form == "ring" else "allgather")
    heads, interaction = _alignment_flops(work)
    block = interaction * work.ranks  # own pairs against all
    if form == "gather_everything":
        heads, flops = heads * work.ranks, _all(block) * work.ranks
    elif form == "local_loss":
        flops = 2 * _all(block)
    else:
        again = block.forward if form == "ring" and work.ranks > 1 else 0
        flops = _all(block) + again
    return FormPlan(heads + flops, flops, _traffic(form, exchanged), work.ranks)


@dataclass(frozen=True)
class _Scaled:
    """FLOPs that are scaled as a whole."""

    forward: float
    rest: float

    def __mul__(self, factor: float) -> "_Scaled":
        return _Scaled(self.forward * factor, self.rest * factor)


def _all(flops: _Scaled) -> float:
    return flops.forward + flops.rest


def _alignment_flops(work: Workload) -> tuple[float, _Scaled]:
    """Of b pairs: clustering and importance, and the interaction of b pairs with b pairs."""
    counted = count_step_flops(work.config, work.t5.backbone, work.lengths.text, work.lengths.smiles)
    share = work.pairs / len(work.lengths.text)
    heads = counted.polymerisation + counted.importance
    own: PartFlops = counted.interaction
    square = share**2
    return (
        share * (heads.forward + heads.backward + heads.redundant),
        _Scaled(square * own.forward, square * (own.backward + own.redundant)),
    )


def _traffic(form: str, work: Workload) -> list[Traffic]:
    """Nothing but what the hierarchical loss needs."""
    if work.ranks == 1:
        return []
    if form == "gather_everything":
        rows = work.element_bytes * work.width * work.pairs * sum(work.tokens.values())
        return [
            Traffic("lengths", "all_gather", 2 * 8 * work.pairs, 2),
            Traffic("states", "all_gather", rows, 2),
            Traffic("gradient of states", "reduce_scatter", work.ranks * rows, 2),
        ]
    small = [
        item
        for item in loss_traffic(work)
        if item.source in ("lengths of the levels", "columns of the scores")
    ]
    if form != "local_loss":
        return small + token_traffic(work)
    other = replace(work, sent="text" if work.travelling == "smiles" else "smiles")
    return [item for item in small if item.kind == "all_gather"] + token_traffic(work) + token_traffic(other)


def paper_rows(
    work: Workload, forms: tuple[str, ...], cluster: Cluster, assumed: Assumptions
) -> list[dict[str, Any]]:
    """Every form on 1 to 1,024 GPUs, the same pairs on each."""
    rows = []
    for ranks in SWEEP:
        machines = cluster.of_size(ranks)
        for form in forms:
            plan = plan_form(form, replace(work, ranks=ranks))
            rows.append(
                {
                    "form": form,
                    "ranks": ranks,
                    "flops": plan.flops,
                    "sent_bytes": plan.sent(),
                    "compute_seconds": plan.flops / interaction_rate(work, machines.gpu, assumed),
                    "communication_seconds": sum(
                        traffic_seconds(item, machines, assumed) for item in plan.traffic
                    ),
                }
            )
    return rows


def default_work(
    width: int, pairs: int, precision: Precision, lengths: PairLengths | None = None
) -> Workload:
    """Three levels of width D over lengths like those of ChEBI-20."""
    config = Config(model=ModelConfig(d_model=width), training=TrainingConfig(precision=precision))
    lengths = lengths or PairLengths.spread(CHEBI20_MEAN["text"], CHEBI20_MEAN["smiles"])
    return Workload(config, T5Sizes.of_model(config.model, 1), lengths, pairs)


def planned(row: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """FLOPs and bytes on paper for a measured row of a `measurement.Problem`."""
    from atomas_kernels.bench.lengths import draw

    count = row["ranks"] * problem.pairs
    lengths = PairLengths(text=draw("text", count, 0).numpy(), smiles=draw("smiles", count, 0).numpy())
    one = default_work(problem.width, problem.pairs, problem.precision, lengths)
    work = replace(one, ranks=row["ranks"])
    plan = plan_form(row["form"], work)
    return {"flops": plan.flops, "planned_sent_bytes": plan.sent("gloo")}
