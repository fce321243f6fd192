"""Time of the matrix products of a step: counted FLOPs over the peak, times the share of it that is assumed."""

from dataclasses import dataclass

from atomas.model.flops import PartFlops, StepFlops, count_step_flops
from atomas.planning.hardware import Assumptions, Gpu
from atomas.planning.workload import Workload

_TF32_PRODUCTS = 3
"""tf32 products that stand for one of float32 in the token interaction."""


def interaction_rate(work: Workload, gpu: Gpu, assumed: Assumptions) -> float:
    """FLOP/s of the token interaction, which multiplies tokens of the run's precision."""
    peak = gpu.tf32_flops / _TF32_PRODUCTS if work.element_bytes == 4 else gpu.bf16_flops
    return peak * assumed.interaction_fraction


@dataclass(frozen=True)
class ComputePlan:
    """FLOPs and seconds of one rank."""

    flops: StepFlops
    backbone_seconds: float
    """Everything but the token interaction"""
    interaction_seconds: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.backbone_seconds + self.interaction_seconds


def rank_flops(work: Workload) -> StepFlops:
    """FLOPs of one rank: its share of those of the global batch.

    Counted on the sample of lengths and scaled: the token interaction grows with b B, the global loss with b (B + Q),
    all else with b. Gradient caching encodes once more; scores that come in tiles are computed again for their
    gradient.
    """
    sample = len(work.lengths.text)
    counted = count_step_flops(work.config, work.t5.backbone, work.lengths.text, work.lengths.smiles)
    linear = work.pairs / sample
    queue = work.config.momentum.queue_size if work.has_momentum else 0
    scales = {
        "interaction": linear * work.batch / sample,
        "contrastive": linear * (work.batch + queue) / sample,
    }
    parts = {name: _scaled(getattr(counted, name), scales.get(name, linear)) for name in _PARTS}
    if work.micro_pairs < work.pairs:
        for name in ("encoder", "polymerisation", "importance"):
            parts[name] += PartFlops(redundant=parts[name].forward)
    if work.tiled:
        parts["interaction"] += PartFlops(redundant=parts["interaction"].forward)
    return StepFlops(**parts)


_PARTS = tuple(StepFlops.__dataclass_fields__)


def _scaled(part: PartFlops, factor: float) -> PartFlops:
    return PartFlops(
        forward=round(part.forward * factor),
        backward=round(part.backward * factor),
        redundant=round(part.redundant * factor),
    )


def plan_compute(work: Workload, gpu: Gpu, assumed: Assumptions) -> ComputePlan:
    """Time of one rank without communication."""
    flops = rank_flops(work)
    accumulation = work.config.training.gradient_accumulation_steps
    own = flops.interaction
    interaction = own.forward + own.backward + own.redundant
    half = work.config.training.precision != "fp32"
    peak = gpu.bf16_flops if half else gpu.tf32_flops
    backbone = (flops.hardware - interaction) / (peak * assumed.matmul_fraction)
    scored = interaction / interaction_rate(work, gpu, assumed)
    return ComputePlan(flops, accumulation * backbone, accumulation * scored)
