"""What an optimizer step did and what it cost, over all ranks: one record of `metrics.jsonl`."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atomas.config import Config
from atomas.data.batching import PairBatch
from atomas.distributed.collectives import all_gather_rows, all_gather_sizes
from atomas.model.flops import BackboneSizes, StepFlops, count_step_flops
from atomas.training.padding import Slots, count_slots
from atomas.training.telemetry import memory_mb
from atomas.training.timing import StepTimer


class StepMeter:
    """Counts the batches of a step, times it, and puts all ranks' numbers together once at its end.

    Observe the phases with `timer` while steps run.
    """

    def __init__(
        self,
        config: Config,
        sizes: BackboneSizes,
        device: torch.device,
        *,
        peak_flops: float,
        encoded_twice: bool,
        scored_twice: bool,
    ) -> None:
        """`peak_flops` is that of all ranks' devices together, per second; the rest as in `count_step_flops`."""
        self.timer = StepTimer(device)
        self._config, self._sizes, self._device = config, sizes, device
        self._peak, self._encoded_twice, self._scored_twice = peak_flops, encoded_twice, scored_twice
        self._lengths: list[Tensor] = []
        self._queues: list[int] = []
        self._slots: list[Slots] = []
        self._skipped = 0

    def begin(self) -> None:
        """Leave out what happened since the last step: call it where that was no part of training."""
        self.timer.lap()

    def count(self, batch: PairBatch, queue: int) -> None:
        """One more batch of the step, still on the host; the momentum queue holds `queue` pairs."""
        self._lengths.append(torch.stack([batch.text.lengths, batch.smiles.lengths], dim=1))
        self._queues.append(queue)
        self._slots.append(count_slots(batch.text.lengths, batch.smiles.lengths, self._config, self._device))
        self._skipped += len(batch.skipped)

    def end(self, means: Mapping[str, Tensor], loader_cpu_seconds: float) -> dict[str, float]:
        """The record of the step since the last one's end. Collective.

        Args:
            means: scalars on the device, the same names on every rank; their mean over ranks is recorded.
            loader_cpu_seconds: processor time that this rank's batches of the step have cost its loader.

        Returns:
            `means`, and what docs/training.md says under "What a step costs".
        """
        values = torch.stack([value.detach().double() for value in means.values()]).tolist()
        seconds, memory = self.timer.lap(), memory_mb(self._device)
        slots = np.array(self._slots).sum(axis=0).tolist()  # tokens, and what they take
        ranks, lengths = self._of_all_ranks(
            [*values, *seconds.values(), *memory.values(), *slots, loader_cpu_seconds, self._skipped]
        )
        self._lengths.clear()
        self._slots.clear()
        self._skipped = 0
        mean, highest = ranks.mean(axis=0), ranks.max(axis=0)
        of_means, of_seconds, of_memory, of_slots, (cpu, skipped) = np.split(
            np.arange(ranks.shape[1]), np.cumsum([len(means), len(seconds), len(memory), len(slots)])
        )
        step_seconds = float(mean[of_seconds].sum())
        record = dict(zip(means, mean[of_means].tolist(), strict=True))
        record |= {"step_seconds": step_seconds}
        record |= {f"seconds/{name}": float(mean[i]) for name, i in zip(seconds, of_seconds, strict=True)}
        record["seconds/data_max"] = float(highest[of_seconds[list(seconds).index("data")]])
        record |= {name: float(highest[i]) for name, i in zip(memory, of_memory, strict=True)}
        record["padding_fraction"] = float(1 - mean[of_slots[0]] / mean[of_slots[1]])
        record |= {"loader_cpu_seconds": float(mean[cpu]), "skipped": float(ranks[:, skipped].sum())}
        return record | self._throughput(lengths, step_seconds)

    def _throughput(self, batches: list[NDArray[np.int64]], seconds: float) -> dict[str, float]:
        """Rates from the lengths [B, 2] of text and SMILES of each batch of the step."""
        flops = sum(
            (
                count_step_flops(
                    self._config,
                    self._sizes,
                    *lengths.T,
                    queue=queue,
                    encoded_twice=self._encoded_twice,
                    scored_twice=self._scored_twice,
                )
                for lengths, queue in zip(batches, self._queues, strict=True)
            ),
            StepFlops(),
        )
        self._queues.clear()
        tokens = sum(int(lengths.sum()) for lengths in batches)
        padded = sum(int(lengths.max(axis=0).sum()) * len(lengths) for lengths in batches)
        return {
            "pairs_per_second": sum(map(len, batches)) / seconds,
            "tokens_per_second": tokens / seconds,
            "padding_avoided": 1 - tokens / padded,
            "flops_per_second": flops.model / seconds,
            "mfu": flops.model / (seconds * self._peak),
            "hfu": flops.hardware / (seconds * self._peak),
        }

    def _of_all_ranks(self, own: list[float]) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
        """The numbers [W, len(own)] of all ranks, and the lengths [B, 2] of every batch, in one exchange."""
        lengths = torch.stack(self._lengths)
        flat = torch.cat([torch.tensor(own, dtype=torch.float64), lengths.flatten().double()]).to(
            self._device
        )
        sizes = all_gather_sizes(len(flat), self._device, "size of the metrics")
        parts = all_gather_rows(flat, sizes, "metrics").cpu().numpy()
        ranks = np.split(parts, np.cumsum(sizes)[:-1])
        of_batches = [rank[len(own) :].astype(np.int64).reshape(len(lengths), -1, 2) for rank in ranks]
        return np.stack([rank[: len(own)] for rank in ranks]), list(np.concatenate(of_batches, axis=1))
