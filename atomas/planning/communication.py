"""What one rank sends in a step, by source: payloads of collectives, and what their algorithms put on the wire.

Of a collective over W ranks a rank sends, with the ring algorithms that NCCL and gloo use for large messages (Thakur,
Rabenseifner, Gropp 2005): (W - 1) times its part of an all-gather; (W - 1) / W of the whole tensor of a
reduce-scatter, twice that of an all-reduce; the message of an exchange with a neighbour. gloo has no reduce-scatter of
lists: torch makes an all-reduce of it. Symbols as in `atomas.planning.memory`.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from atomas.phases import CollectiveKind
from atomas.planning.memory import stage_3_reuse
from atomas.planning.workload import Workload

Backend = Literal["nccl", "gloo"]
Hidden = Literal["no", "backward", "interaction"]


@dataclass(frozen=True)
class Traffic:
    """One source of bytes, summed over a step."""

    source: str
    kind: CollectiveKind
    payload: float
    """Bytes that this rank puts in, as in `atomas.phases.Collective`"""
    calls: float = 1
    hidden: Hidden = "no"
    """Under which computation it can hide"""

    def sent(self, ranks: int, backend: Backend = "nccl") -> float:
        """Bytes that this rank sends."""
        return self.payload * wire_factor(self.kind, ranks, backend)

    def times(self, factor: int) -> "Traffic":
        """The same, so many times."""
        return replace(self, payload=factor * self.payload, calls=factor * self.calls)

    def messages(self, ranks: int) -> float:
        """Messages one after the other, each of which costs a latency."""
        if self.kind == "exchange":
            return self.calls
        return self.calls * (ranks - 1) * (2 if self.kind == "all_reduce" else 1)


def wire_factor(kind: CollectiveKind, ranks: int, backend: Backend = "nccl") -> float:
    """Bytes that a rank sends for each byte of payload."""
    if ranks == 1:
        return 0.0
    if kind == "all_gather":
        return ranks - 1
    if kind == "exchange":
        return 1.0
    if kind == "all_reduce" or (kind == "reduce_scatter" and backend == "gloo"):
        return 2 * (ranks - 1) / ranks
    return (ranks - 1) / ranks


@dataclass(frozen=True)
class CommunicationPlan:
    """All traffic of one rank in one step."""

    traffic: tuple[Traffic, ...]
    ranks: int

    def sent(self, backend: Backend = "nccl") -> float:
        """Bytes that this rank sends."""
        return sum(item.sent(self.ranks, backend) for item in self.traffic)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            item.source: {
                "kind": item.kind,
                "payload_bytes": round(item.payload),
                "sent_bytes": round(item.sent(self.ranks)),
            }
            for item in self.traffic
        }


def plan_communication(work: Workload, stage: int) -> CommunicationPlan:
    """Traffic of one rank under a ZeRO stage, with the exchange of tokens that the configuration names."""
    if work.ranks == 1:
        return CommunicationPlan((), 1)
    batches = work.config.training.gradient_accumulation_steps
    of_batch = [item.times(batches) for item in (*loss_traffic(work), *token_traffic(work))]
    items = [*_engine(work, stage), *of_batch, *_momentum(work, stage)]
    return CommunicationPlan(tuple(item for item in items if item.payload), work.ranks)


def _engine(work: Workload, stage: int) -> list[Traffic]:
    """What DeepSpeed sends for gradients and weights.

    Stages 1 and 2 reduce gradients over all ranks, of which each keeps its own part, and gather the stepped weights.
    Stage 3 gathers weights for every forward pass, and again for the backward pass those that it has not kept, and
    scatters the sums of gradients.
    """
    weights = work.weight_bytes * work.parameters.total
    passes = -(-work.pairs // work.micro_pairs)
    accumulation = work.config.training.gradient_accumulation_steps
    if stage < 3:
        reductions = accumulation * passes if stage == 2 else 1
        hidden: Hidden = "backward" if stage else "no"  # DeepSpeed overlaps from stage 1 on
        items = [Traffic("gradients", "all_reduce", reductions * weights, reductions, hidden)]
        if stage:
            items.append(Traffic("stepped weights", "all_gather", weights / work.ranks))
        return items
    cached = 1 if passes > 1 else 0
    rounds = accumulation * passes
    layers = work.t5.backbone.layers + work.t5.backbone.decoder_layers
    part, again = weights / work.ranks, 1 - stage_3_reuse(work)
    return [
        Traffic("weights, forward", "all_gather", rounds * (1 + cached) * part, layers * rounds, "backward"),
        Traffic("weights, backward", "all_gather", rounds * again * part, layers * rounds, "backward"),
        Traffic("gradients", "reduce_scatter", rounds * weights, layers * rounds, "backward"),
    ]


def loss_traffic(work: Workload) -> list[Traffic]:
    """Features of the global loss, and the small facts that all ranks need of the batch."""
    loss, b, width = work.config.loss, work.pairs, work.width
    aligned = sum(level.aligned for level in work.levels["text"])
    items = [Traffic("identities and lengths", "all_gather", 8 * (5 * b + 1), 2)]
    if loss.global_weight:
        items.append(Traffic("global features", "all_gather", 2 * 4 * width * b))
        if work.has_momentum:
            items.append(Traffic("momentum features", "all_gather", 2 * 4 * width * b))
        else:
            items.append(Traffic("gradient of global features", "reduce_scatter", 2 * 4 * width * work.batch))
    if aligned:
        items.append(Traffic("lengths of the levels", "all_gather", 8 * 2 * aligned * b))
        items.append(
            Traffic("columns of the scores", "all_reduce", aligned * 3 * 4 * work.batch, 2 * aligned)
        )
    return items


def token_traffic(work: Workload) -> list[Traffic]:
    """Tokens of the smaller modality in the run's precision, their float32 weights, and float32 gradients of both.

    `allgather`: once forward, and the gradient is summed where it belongs. `ring`: W - 1 hops forward; in the backward
    pass as many again, and the gradient goes all the way round.
    """
    levels = work.levels[work.travelling]
    items = []
    for number, level in enumerate(levels):
        if not level.aligned:
            continue
        count = work.pairs * level.tokens
        block, gradient = (size * count for size in (work.token_row_bytes, work.token_gradient_bytes))
        name = f"tokens of level {number}"
        if work.config.loss.exchange == "ring":
            hops = work.ranks - 1
            items += [
                Traffic(name, "exchange", 2 * hops * block, 2 * hops, "interaction"),
                Traffic(f"gradient of {name}", "exchange", work.ranks * gradient, work.ranks, "interaction"),
            ]
        else:
            again = 2 if work.micro_pairs < work.pairs else 1
            items += [
                Traffic(name, "all_gather", again * block, again),
                Traffic(f"gradient of {name}", "reduce_scatter", work.ranks * gradient),
            ]
    return items


def _momentum(work: Workload, stage: int) -> list[Traffic]:
    """The replica is filled from the masters' parts, each padded to the largest: see `Workload.slow_share`."""
    if not work.has_momentum or not stage:
        return []
    part = work.momentum_bytes * work.slow_share(stage)
    if stage == 3 and work.config.momentum.forward == "layerwise":
        passes = -(-work.pairs // work.micro_pairs) * work.config.training.gradient_accumulation_steps
        return [
            Traffic(
                "momentum weights, forward", "all_gather", passes * part, work.t5.backbone.layers * passes
            )
        ]
    return [Traffic("momentum replica", "all_gather", part)]
