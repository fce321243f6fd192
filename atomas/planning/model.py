"""A step on a cluster: memory, computation and communication together give time, pairs per second and what fits."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from atomas.planning.communication import CommunicationPlan, Traffic, plan_communication
from atomas.planning.compute import ComputePlan, plan_compute
from atomas.planning.hardware import Assumptions, Cluster
from atomas.planning.memory import MemoryPlan, plan_memory
from atomas.planning.workload import Workload

Exchange = Literal["allgather", "ring"]
EXCHANGES: tuple[Exchange, ...] = ("allgather", "ring")
SWEEP = tuple(2**power for power in range(11))
"""GPUs of the scaling curve: 1 to 1,024."""
_MOST_PAIRS = 2**20


@dataclass(frozen=True)
class StepPlan:
    """One step of one rank."""

    work: Workload
    stage: int
    memory: MemoryPlan
    compute: ComputePlan
    communication: CommunicationPlan
    communication_seconds: float
    """If nothing were hidden"""
    exposed_seconds: float
    """What computation does not hide"""

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute.seconds + self.exposed_seconds

    @property
    def pairs_per_second(self) -> float:
        """Of all ranks."""
        return self.work.batch * self.work.config.training.gradient_accumulation_steps / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "gpus": self.work.ranks,
            "pairs_per_gpu": self.work.pairs,
            "zero_stage": self.stage,
            "exchange": self.work.config.loss.exchange,
            "memory": self.memory.as_dict(),
            "model_flops": self.compute.flops.model,
            "compute_seconds": self.compute.seconds,
            "interaction_seconds": self.compute.interaction_seconds,
            "sent_bytes": round(self.communication.sent()),
            "traffic": self.communication.as_dict(),
            "communication_seconds": self.communication_seconds,
            "exposed_communication_seconds": self.exposed_seconds,
            "step_seconds": self.seconds,
            "pairs_per_second": self.pairs_per_second,
        }


def plan_step(work: Workload, stage: int, cluster: Cluster, assumed: Assumptions) -> StepPlan:
    """Time and memory of a step; `cluster` has as many GPUs as `work` has ranks."""
    assert cluster.ranks == work.ranks
    compute = plan_compute(work, cluster.gpu, assumed)
    communication = plan_communication(work, stage)
    seconds = dict.fromkeys(("no", "backward", "interaction"), 0.0)
    for item in communication.traffic:
        seconds[item.hidden] += traffic_seconds(item, cluster, assumed)
    backward = compute.backbone_seconds * _backward_share(compute) * assumed.overlap_fraction
    exposed = (
        seconds["no"]
        + max(0.0, seconds["backward"] - backward)
        + max(0.0, seconds["interaction"] - compute.interaction_seconds)
    )
    return StepPlan(
        work=work,
        stage=stage,
        memory=plan_memory(work, stage),
        compute=compute,
        communication=communication,
        communication_seconds=sum(seconds.values()),
        exposed_seconds=exposed,
    )


def traffic_seconds(item: Traffic, cluster: Cluster, assumed: Assumptions) -> float:
    """If nothing else is sent at the same time."""
    neighbours = item.kind == "exchange"
    rate = cluster.neighbour_bytes_per_second if neighbours else cluster.collective_bytes_per_second
    latency = item.messages(cluster.nodes) * assumed.latency_seconds if cluster.nodes > 1 else 0.0
    return item.sent(cluster.ranks) / (rate * assumed.link_fraction) + latency


def _backward_share(compute: ComputePlan) -> float:
    total = compute.flops.total
    return total.backward / max(1, total.forward + total.backward)


def with_exchange(work: Workload, exchange: Exchange) -> Workload:
    """The same workload in another exchange mode."""
    loss = replace(work.config.loss, exchange=exchange)
    return replace(work, config=replace(work.config, loss=loss))


def largest_pairs(work: Workload, stage: int, bytes_available: float) -> int:
    """Most pairs of one rank whose step fits, by bisection; 0 if not even one does."""

    def fits(pairs: int) -> bool:
        return plan_memory(replace(work, pairs=pairs), stage).peak <= bytes_available

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _MOST_PAIRS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def scaling(work: Workload, stage: int, cluster: Cluster, assumed: Assumptions) -> list[StepPlan]:
    """The same pairs on every rank, on 1 to 1,024 GPUs."""
    return [plan_step(replace(work, ranks=ranks), stage, cluster.of_size(ranks), assumed) for ranks in SWEEP]


def communication_bound(steps: list[StepPlan]) -> int | None:
    """Fewest GPUs from which on exposed communication takes longer than computation; None if it never does."""
    bound = None
    for step in reversed(steps):
        if step.exposed_seconds <= step.compute.seconds:
            break
        bound = step.work.ranks
    return bound
