"""Everything that watches a run and does not change it."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from atomas.distributed.agreement import together
from atomas.distributed.collectives import all_reduce
from atomas.json_files import write_json
from atomas.model.flops import BackboneSizes
from atomas.phases import observed_by
from atomas.training.memory import MemoryReport
from atomas.training.meter import StepMeter
from atomas.training.peak_flops import peak_flops
from atomas.training.session import Session
from atomas.training.telemetry import Progress
from atomas.training.trace import TracedSteps
from atomas.training.tracking import Records


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """Of one rank of one attempt; records and progress are rank 0's."""

    records: Records
    progress: Progress
    trace: TracedSteps
    meter: StepMeter
    memory: MemoryReport

    @classmethod
    @contextmanager
    def of(cls, session: Session) -> Iterator["Instruments"]:
        """Open all of them for the steps of `session`. Collective.

        Raises:
            AtomasError: a dashboard's package is not installed.
        """
        config, device, placement = session.config, session.device, session.placement
        attempt, is_rank_zero = session.run.attempt_path, placement.rank == 0
        peak = peak_flops(device, config.training.precision)
        with together("opening the records of the run"):
            records = Records(config, attempt, enabled=is_rank_zero)
            if is_rank_zero:
                environment = json.loads((attempt / "env.json").read_text(encoding="utf-8"))
                write_json(attempt / "env.json", environment | {"peak_flops": dataclasses.asdict(peak)})
        progress = Progress(
            start=session.step,
            total=config.training.max_steps,
            every=config.training.log_every,
            enabled=is_rank_zero,
        )
        trace = TracedSteps(
            config.training.traced, attempt / "trace" / f"rank_{placement.rank:04d}.json", device
        )
        of_all = all_reduce(
            torch.tensor([peak.per_second], dtype=torch.float64, device=device), "peak FLOP/s"
        )
        cached = session.micro_batches > 1
        meter = StepMeter(
            config,
            BackboneSizes.of_t5(session.engine.module.encoder.backbone.t5.config),
            device,
            peak_flops=float(of_all),
            encoded_twice=cached,
            scored_twice=cached or (config.loss.exchange == "ring" and placement.world_size > 1),
        )
        with together("writing the memory plan"):
            memory = MemoryReport(session)
        try:
            with observed_by(meter.timer):
                yield cls(records=records, progress=progress, trace=trace, meter=meter, memory=memory)
        finally:
            trace.close()
            progress.close()
            records.close()
