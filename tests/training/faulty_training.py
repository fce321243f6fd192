"""`atomas train` with something that goes wrong on one rank.

python -m tests.training.faulty_training FAULT RANK ARGUMENT train ...

signal:NAME        the rank signals itself when it enters, for the second time, the phase ARGUMENT (data, evaluation,
                   checkpoint, ...); `first:` before the phase means the first time
kill_in_save       SIGKILL after the first file of the checkpoint of step ARGUMENT, or before rank 0 publishes it
nan                the loss of step ARGUMENT is not finite
spike              the loss of the pairs of data steps FIRST-STOP (ARGUMENT) is forty times what it should be
spike_save         the same, and a checkpoint is asked for at the first of them
memory             the rank may allocate no more memory from batch ARGUMENT on
half               none: DeepSpeed takes fp16 on a CPU, where it is slow
"""

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from atomas.cli import main
from atomas.phases import Observer, observed_by


class SignalInPhase(Observer):
    """Signals its own process where a phase begins."""

    def __init__(self, name: str, where: str) -> None:
        self._signal = signal.Signals[name]
        self._left = 1 if where.startswith("first:") else 2
        self._phase = where.removeprefix("first:")

    def enter(self, name: str) -> None:
        """See `Observer`."""
        if name == self._phase:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._signal)


def kill_in_save(name: str) -> None:
    """Die in the midst of the checkpoint `name` = RANK_STEP:part or RANK_STEP:publish."""
    from atomas.training import saver, snapshot

    step, where = name.split(":")
    write, publish = snapshot.write_tensors, saver.publish

    def write_one(path: Path, *arguments: Any) -> None:
        write(path, *arguments)
        if f"step_{int(step):08d}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    def publish_none(partial: Path, *arguments: Any) -> None:
        if f"step_{int(step):08d}" in str(partial):
            os.kill(os.getpid(), signal.SIGKILL)
        publish(partial, *arguments)

    if where == "part":
        snapshot.write_tensors = write_one  # type: ignore[assignment]
    else:
        saver.publish = publish_none  # type: ignore[assignment]


def bend_loss(fault: str, argument: str) -> None:
    """Let the model return a loss that is not finite, or much too large."""
    from atomas.data.stream import PairStream
    from atomas.model.atomas import AtomasModel
    from atomas.training.run_directory import RunDirectory

    forward, load = AtomasModel.forward, PairStream.__getitem__
    bad: set[int] = set()
    spikes: list[int] = []
    calls = 0

    def load_and_note(stream: PairStream, number: int) -> Any:
        batch = load(stream, number)
        if fault.startswith("spike") and number in range(*map(int, argument.split("-"))):
            bad.add(hash(tuple(batch.sample_id.tolist())))
        return batch

    def bent(model: AtomasModel, batch: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        losses = forward(model, batch, *rest)
        if fault == "nan" and calls in map(int, argument.split(",")):
            losses["loss"] = losses["loss"] * float("nan")
        if fault.startswith("spike") and hash(tuple(batch.sample_id.tolist())) in bad:
            losses["loss"] = losses["loss"] * 40
            spikes.append(calls)
        return losses

    PairStream.__getitem__ = load_and_note  # type: ignore[method-assign]
    AtomasModel.forward = bent  # type: ignore[method-assign]
    if fault == "spike_save":
        RunDirectory.take_save_request = lambda _: spikes[:1] == [calls]  # type: ignore[method-assign]


def without_memory(batch: str) -> None:
    """From batch number `batch` on nothing large can be allocated."""
    import torch

    from atomas.data.loader import OrderedItems

    take = OrderedItems.__next__
    taken = 0

    def take_or_fail(items: OrderedItems[Any]) -> Any:
        nonlocal taken
        taken += 1
        if taken == int(batch):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, used + 2**20))
            torch.empty(2**28)
        return take(items)

    OrderedItems.__next__ = take_or_fail  # type: ignore[method-assign]


def main_with_fault(fault: str, rank: str, argument: str, *arguments: str) -> None:
    """Run `atomas ARGUMENTS` with the fault on rank RANK, or on all for "all"."""
    if rank not in ("all", os.environ.get("RANK", "0")):
        main(arguments)
    elif fault.startswith("signal:"):
        with observed_by(SignalInPhase(fault.removeprefix("signal:"), argument)):
            main(arguments)
    else:
        if fault == "kill_in_save":
            kill_in_save(argument)
        elif fault == "memory":
            without_memory(argument)
        elif fault == "half":
            os.environ["DS_ACCELERATOR"] = "cpu"
            from deepspeed.accelerator import get_accelerator

            type(get_accelerator()).is_fp16_supported = lambda _: True
        else:
            bend_loss(fault, argument)
        main(arguments)


if __name__ == "__main__":
    main_with_fault(*sys.argv[1:])
