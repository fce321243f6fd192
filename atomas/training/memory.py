"""Memory of a run: planned by component before the first step, and measured beside it after some."""

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from atomas.json_files import write_json
from atomas.planning.memory import MemoryPlan, plan_memory
from atomas.planning.sizes import T5Sizes
from atomas.planning.workload import PairLengths, Workload
from atomas.training.memory_gauge import MemoryGauge
from atomas.training.nvme import swap_buffer_bytes
from atomas.training.session import Session

logger = logging.getLogger("atomas")

PLANNED_STEPS = 100
"""The plan is for the one of their batches with the most tokens."""
TOLD_AFTER = 3
"""Steps after which the peak is told; the first ones still make the optimizer's states."""


class MemoryReport:
    """`memory.json` of an attempt: the plan of rank 0, then what was measured there."""

    def __init__(self, session: Session) -> None:
        """Print and write the plan, on rank 0."""
        self._session = session
        self._enabled = session.placement.rank == 0
        self._path = session.run.attempt_path / "memory.json"
        self._first = session.step
        if not self._enabled:
            return
        self._plan = plan_of_run(session, range(self._first, self._first + PLANNED_STEPS))
        logger.info(
            "memory planned for one rank, %.0f MiB at most:\n%s",
            self._plan.peak / 2**20,
            "\n".join(self._plan.lines()),
        )
        write_json(self._path, {"planned": self._plan.as_dict()})
        self._gauge = MemoryGauge(session.device, held=sum(held_bytes(session).values()))

    def after_step(self) -> None:
        """Tell the peak of the first steps, beside what is planned for their batches."""
        session, steps = self._session, self._session.step - self._first
        last = session.step == session.config.training.max_steps
        if not self._enabled or (steps < TOLD_AFTER and not last):
            return
        self._enabled = False
        self._gauge.close()
        peak, planned = self._gauge.peak(), plan_of_run(session, range(self._first, session.step)).peak
        logger.info(
            "memory of the first %d steps: %.0f MiB at most, %.0f MiB were planned for their batches",
            steps, peak / 2**20, planned / 2**20,
        )  # fmt: skip
        measured = {
            "steps": steps,
            "peak_bytes": peak,
            "planned_bytes": planned,
            "components": held_bytes(session),
        }
        try:
            write_json(self._path, {"planned": self._plan.as_dict(), "measured": measured})
        except OSError as error:  # a full disk does not end the training, nor may one rank end alone
            logger.warning("the memory of this attempt could not be written down: %s", error)


def plan_of_run(session: Session, steps: range) -> MemoryPlan:
    """The plan of one rank for the batch with the most tokens of some steps."""
    config, device, ranks = session.config, session.device, session.placement.world_size
    t5 = session.engine.module.encoder.backbone.t5
    tied = not hasattr(t5, "lm_head") or t5.lm_head.weight is t5.shared.weight
    work = Workload(
        config,
        T5Sizes.of_t5(t5.config, tied=tied),
        _longest_batch(session, steps),
        config.data.batch_size // ranks,
        ranks,
    )
    return plan_memory(work, config.deepspeed.zero_stage, "cuda" if device.type == "cuda" else "cpu")


def _longest_batch(session: Session, steps: range) -> PairLengths:
    """Lengths of all ranks' pairs: they are dealt so that every rank has nearly as many tokens."""
    data, order = session.config.data, session.stream.order
    accumulation, size = session.config.training.gradient_accumulation_steps, data.batch_size
    stop = min(steps.stop, session.config.training.max_steps)
    batches = [
        session.stream.lengths(order.indices(number * size, (number + 1) * size))
        for number in range(steps.start * accumulation, max(steps.start + 1, stop) * accumulation)
    ]
    text, smiles = max(batches, key=lambda lengths: int(lengths[0].sum() + lengths[1].sum()))
    return PairLengths(text=text, smiles=smiles)


def held_bytes(session: Session) -> dict[str, int]:
    """Bytes of the tensors that a rank holds between steps, under the names of the plan's components."""
    engine, momentum = session.engine, session.momentum
    seen: set[int] = set()
    parts = {
        "parameters": _bytes((_held(p) for p in engine.module.parameters()), seen),
        "fp32 masters": _bytes(session.shard.masters.values(), seen),
        "optimizer states": _bytes(
            (value for state in engine.basic_optimizer.state.values() for value in state.values()), seen
        ),
    }
    if momentum is not None:
        parts |= {
            "momentum weights": _bytes((_held(p) for p in momentum.parameters()), seen),
            "momentum masters": _bytes(momentum.masters.values(), seen),
            "queue": _bytes(momentum.queue.buffers(), seen),
        }
    if hasattr(engine, "swap_folder"):
        parts["swap buffers"] = swap_buffer_bytes(engine)
    return {name: size for name, size in parts.items() if size}


def _held(parameter: Any) -> Tensor:
    """What this rank keeps of a parameter: under ZeRO stage 3 its partition."""
    held: Tensor = getattr(parameter, "ds_tensor", parameter)
    return held


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    """Bytes of the storages that are not among those `seen`, which they join."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            total += tensor.untyped_storage().nbytes()
    return total
