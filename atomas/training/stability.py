"""Numerical trouble: steps that were left out because something was not finite, and losses that jump.

Every rank judges the same numbers, those of all ranks together, so that all come to the same end without a vote.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atomas.config import StabilityConfig
from atomas.data.batching import PairBatch
from atomas.data.tokenizer import AtomasTokenizer
from atomas.errors import AtomasError
from atomas.training.tensor_files import write_tensors

RECENT = 100
"""Steps among which those that were left out are counted."""
BAD_STEPS = "bad_steps"
"""Folder of their batches in that of the attempt."""
KEPT_STEPS = 20
"""Bad steps of one attempt whose batches are kept."""
_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class NumericalTroubleError(AtomasError):
    """The run ends because its losses or gradients make no sense any more."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Of one step."""

    remark: str = ""
    """For the log, where something is wrong with it"""
    trouble: str = ""
    """Why the run cannot just go on, where that is so"""


class Stability:
    """The recent losses, and which steps were left out."""

    def __init__(self, config: StabilityConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._left_out: list[int] = []
        self._spikes = 0
        self.left_out = 0
        """Steps of the run that were left out"""

    def score(self, loss: float) -> float:
        """How many robust standard deviations a loss lies above the median of the window; 0 until that is full.

        A deviation under 0.1 % of the median counts as that much: where losses hardly move, noise is no spike.
        """
        if len(self._losses) < self._config.spike_window:
            return 0.0
        median = statistics.median(self._losses)
        deviation = _NORMAL * statistics.median(abs(value - median) for value in self._losses)
        return (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)

    def judge(self, step: int, loss: float, *, left_out: bool) -> Judgement:
        """Take the loss of optimizer step `step`, counted from 1.

        Args:
            step: its number.
            loss: mean over ranks.
            left_out: the optimizer did not step, as the loss or the gradient was not finite.
        """
        config = self._config
        if left_out:
            self.left_out += 1
            self._left_out = [number for number in self._left_out if number > step - RECENT] + [step]
            remark = f"step {step} is left out on all ranks: its loss or gradient is not finite"
            if len(self._left_out) <= config.skipped_limit:
                return Judgement(remark=remark)
            return Judgement(
                remark=remark,
                trouble=f"{len(self._left_out)} of the last {RECENT} steps had a loss or gradient that is not finite "
                f"(stability.skipped_limit = {config.skipped_limit}), the last of them step {step}",
            )
        if not math.isfinite(loss):  # an fp16 overflow: the loss scale follows
            return Judgement()
        score = self.score(loss)
        self._losses.append(loss)
        if not config.spike_score or score <= config.spike_score:
            self._spikes = 0
            return Judgement()
        self._spikes += 1
        remark = f"loss spike: {loss:.4g} in step {step} is {score:.1f} deviations above the last {len(self._losses)}"
        if self._spikes < config.spike_steps or not config.rollbacks:
            return Judgement(remark=remark)
        return Judgement(remark=remark, trouble=f"{remark}, the last of {self._spikes} in a row")

    @property
    def in_doubt(self) -> bool:
        """The last losses were spikes: the run may soon have to go back to before them.

        Nothing is saved then that is not asked for; what is, on a stop or a SAVE file, is no place to go back to.
        """
        return self._spikes > 0 and self._config.rollbacks > 0

    def record(self) -> dict[str, float]:
        """For `metrics.jsonl`."""
        return {"steps_left_out": self.left_out}

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "losses": list(self._losses),
            "recently_left_out": self._left_out,
            "spikes": self._spikes,
            "left_out": self.left_out,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Counterpart of `state`."""
        self._losses = deque(state["losses"], maxlen=self._config.spike_window)
        self._left_out, self._spikes = list(state["recently_left_out"]), state["spikes"]
        self.left_out = state["left_out"]


def keep_batches(
    folder: Path,
    rank: int,
    batches: Sequence[PairBatch],
    tokenizer: AtomasTokenizer,
    about: Mapping[str, Any],
) -> None:
    """Keep the batches of a bad step: token ids as safetensors, and the same as text in JSON.

    Args:
        folder: of the step; nothing is kept where there are KEPT_STEPS of them already.
        rank: whose batches these are.
        batches: on the host, in the order of the accumulation.
        tokenizer: makes text of them.
        about: what else is known of the step.

    Raises:
        OSError: it cannot be written.
    """
    if not folder.exists() and len(list(folder.parent.glob("step_*"))) >= KEPT_STEPS:
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    pairs = []
    for number, batch in enumerate(batches):
        sides = {"text": batch.text, "smiles": batch.smiles}
        for side, tokens in sides.items():
            tensors |= {f"{number}/{side}/ids": tokens.ids, f"{number}/{side}/lengths": tokens.lengths}
        tensors |= {f"{number}/sample_id": batch.sample_id}
        words = {
            side: [tokenizer.decode(ids.tolist()) for ids in tokens.ids.split(tokens.lengths.tolist())]
            for side, tokens in sides.items()
        }
        for row, sample in enumerate(batch.sample_id.tolist()):
            pairs.append({"batch": number, "sample_id": sample, **{side: words[side][row] for side in sides}})
    write_tensors(folder / f"rank_{rank:04d}.safetensors", tensors)
    content = {**about, "pairs": pairs}
    (folder / f"rank_{rank:04d}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
