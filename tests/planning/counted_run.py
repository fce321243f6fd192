"""`atomas train` in this process, counting what it allocates and what it sends: `counted_run.py OUT KEY=VALUE ...`.

Started once for every rank. Rank 0 writes: the most bytes of tensors at once (as torch's profiler counts them on the
CPU), and per step the payloads handed to torch.distributed, ours and DeepSpeed's alike, and the bytes that the
loopback interface saw, which is all traffic of the run where the run has a network namespace of its own.
"""

import inspect
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from atomas.config_file import load_config
from atomas.phases import Collective, Observer, observed_by

CALLS = {
    "all_reduce": ("all_reduce", "tensor"),
    "all_gather": ("all_gather", "tensor"),
    "all_gather_into_tensor": ("all_gather", "input_tensor"),
    "reduce_scatter": ("reduce_scatter", "input_list"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "batch_isend_irecv": ("exchange", "p2p_op_list"),
}
"""Functions of torch.distributed, their kind, and the argument that holds what this rank puts in."""
SKIPPED_STEPS = 2
"""The first steps make optimizer states and pick communication buffers."""


class Traffic(Observer):
    """What this rank puts into collectives between the ends of two optimizer phases."""

    def __init__(self) -> None:
        self.steps: list[tuple[Counter[str], Counter[str], int]] = []
        self.payloads: Counter[str] = Counter()
        self.ours: Counter[str] = Counter()
        self._nested = False

    def collective(self, call: Collective) -> None:
        self.ours[f"{call.kind}: {call.what}"] += call.payload_bytes

    def leave(self, name: str) -> None:
        if name == "optimizer":
            self.steps.append((self.payloads.copy(), self.ours.copy(), loopback_bytes()))

    def watch(self) -> None:
        """Count every call to torch.distributed from now on."""
        for name, (kind, argument) in CALLS.items():
            if hasattr(dist, name):
                self._wrap(name, kind, argument)

    def _wrap(self, name: str, kind: str, argument: str) -> None:
        original = getattr(dist, name)
        signature = inspect.signature(original)

        def counted(*args: Any, **keys: Any) -> Any:
            if not self._nested:  # one of these functions may call another
                given = signature.bind(*args, **keys).arguments[argument]
                self.payloads[kind] += size(given)
            self._nested = True
            try:
                return original(*args, **keys)
            finally:
                self._nested = False

        setattr(dist, name, counted)


def size(given: Any) -> int:
    """Bytes of a tensor, of all tensors of a list, or of those that a list of operations sends."""
    if isinstance(given, torch.Tensor):
        return given.nbytes
    sent = [item.tensor if item.op is dist.isend else None for item in given if isinstance(item, dist.P2POp)]
    return sum(item.nbytes for item in sent or given if item is not None)


def loopback_bytes() -> int:
    """Bytes that the loopback interface of this network namespace has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def per_step(steps: list[Any], place: int) -> Any:
    """Mean difference of a running count over the counted steps."""
    first, last = steps[SKIPPED_STEPS - 1][place], steps[-1][place]
    count = len(steps) - SKIPPED_STEPS
    if isinstance(first, int):
        return (last - first) / count
    return {name: (last[name] - first[name]) / count for name in last}


def most_allocated(run: Any) -> int:
    """Most bytes of tensors at once."""
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    what, out, *overrides = sys.argv[1:]
    config = load_config(None, overrides)
    traffic = Traffic()
    traffic.watch()
    from atomas.training import loop
    from atomas.training.stop_signal import StopSignal

    lengths: list[tuple[list[int], list[int]]] = []
    step = loop.contrastive_step

    def recorded(engine: Any, momentum: Any, batch: Any, **keys: Any) -> Any:
        lengths.append((batch.text.lengths.tolist(), batch.smiles.lengths.tolist()))
        return step(engine, momentum, batch, **keys)

    loop.contrastive_step = recorded
    result: dict[str, Any] = {}
    if what == "memory":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            code = loop.train(config, StopSignal())
        result["most_allocated"] = most_allocated(run)
    else:
        with observed_by(traffic):
            code = loop.train(config, StopSignal())
        result |= dict(
            zip(("payloads", "ours", "wire"), (per_step(traffic.steps, n) for n in range(3)), strict=True)
        )
    assert code == 0, code
    result["text"], result["smiles"] = (
        [n for batch in lengths[SKIPPED_STEPS:] for n in batch[m]] for m in (0, 1)
    )
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
