"""Written by the model: captions from SMILES, SMILES from texts, by beam search or sampling."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from atomas.data.batching import RaggedTokens
from atomas.data.tokenizer import EOS_ID, PAD_ID, UNK_ID, AtomasTokenizer
from atomas.errors import AtomasError
from atomas.model.atomas import AtomasModel
from atomas_kernels.layout import pad

Task = Literal["captioning", "generation"]
"""What is written: a caption for a SMILES, or a SMILES for a text."""

SOURCE: dict[Task, Literal["smiles", "text"]] = {"captioning": "smiles", "generation": "text"}
TARGET: dict[Task, Literal["smiles", "text"]] = {"captioning": "text", "generation": "smiles"}
LEARNED: dict[str, Task] = {"gentext": "captioning", "genmol": "generation"}
"""What a model writes that was trained for one task only, by its `loss.task`."""


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """How outputs are searched for; the defaults are those of the published evaluation."""

    beams: int = 5
    """width of the beam search; 1 is greedy"""
    max_tokens: int = 512
    """longest output in tokens, its end included"""
    length_penalty: float = 1.0
    """exponent of the length by which a beam's log-probability is divided; above 1 favours long outputs"""
    num_return_sequences: int = 1
    """outputs for each input, best first"""
    sample: bool = False
    """draw tokens at random instead of searching for the most probable sequence"""
    temperature: float = 1.0
    """of the sampling; lower is closer to greedy"""
    top_k: int = 0
    """sample among the k most probable tokens; 0 is all"""
    top_p: float = 1.0
    """sample among the most probable tokens that together have this probability"""
    seed: int = 0
    """of the sampling"""

    def __post_init__(self) -> None:
        """Raise AtomasError, naming the setting, where one makes no sense."""
        for name in ("beams", "max_tokens", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise AtomasError(f"{name} = {getattr(self, name)}: it must be at least 1")
        if not self.sample and self.num_return_sequences > self.beams:
            raise AtomasError(
                f"num_return_sequences = {self.num_return_sequences} of {self.beams} beams: "
                "raise the beams, or sample"
            )
        if not 0 < self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise AtomasError("sampling needs temperature > 0, top_k >= 0 and 0 < top_p <= 1")
        if not self.sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise AtomasError("temperature, top_k and top_p are of sampling, which --sample asks for")
        if not math.isfinite(self.length_penalty):
            raise AtomasError(f"length_penalty = {self.length_penalty}: it must be finite")

    def for_transformers(self, *, start_id: int, vocab_size: int, rows: int) -> GenerationConfig:
        """The same from `start_id` on; the embedding's `rows` from `vocab_size` on are no tokens, and never written."""
        sampling: dict[str, Any] = {"do_sample": False}
        if self.sample:
            sampling = {
                "do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p
            }  # fmt: skip
        return GenerationConfig(
            num_beams=1 if self.sample else self.beams,
            max_new_tokens=self.max_tokens,
            length_penalty=self.length_penalty,
            num_return_sequences=self.num_return_sequences,
            decoder_start_token_id=start_id,
            pad_token_id=PAD_ID,
            eos_token_id=EOS_ID,
            suppress_tokens=[UNK_ID, *range(vocab_size, rows)],
            **sampling,
        )


class Writer:
    """The decoder of a model, for strings."""

    def __init__(
        self,
        model: AtomasModel,
        tokenizer: AtomasTokenizer,
        settings: DecodingSettings,
        *,
        task: Task,
        device: torch.device,
        synchronized: bool = False,
    ) -> None:
        """`model` lives on `device`, in evaluation mode.

        `synchronized` is for weights that are spread over the ranks (ZeRO stage 3): every forward pass gathers
        them collectively, so that a rank with short outputs goes on stepping until the last one is done. All
        ranks must then call `write` equally often.

        Raises:
            AtomasError: the model was trained without a decoder.
        """
        self._backbone = model.encoder.backbone
        if not hasattr(self._backbone.t5, "lm_head"):
            raise AtomasError(
                "the checkpoint has no decoder: it was trained with loss.lm_weight = 0 and cannot write"
            )
        self._tokenizer = tokenizer
        self._device = device
        self._settings = settings
        self._config = settings.for_transformers(
            start_id=model.start_id(TARGET[task]),
            vocab_size=tokenizer.vocab_size,
            rows=self._backbone.t5.config.vocab_size,
        )
        self.synchronized = synchronized
        self._backbone.in_step = synchronized

    @torch.no_grad()
    def write(self, sources: Sequence[str], *, seed: int = 0) -> list[list[str]]:
        """`num_return_sequences` outputs for each source, best first; one pass of the decoder for all.

        `seed` is added to that of the settings: the same call gives the same samples.
        """
        if not sources:
            return []
        tokens = RaggedTokens.from_lists(self._tokenizer.encode_batch(sources)).to(self._device)
        states = self._backbone.encode(tokens)
        padded = pad(states, tokens.lengths)
        mask = torch.arange(padded.shape[1], device=self._device) < tokens.lengths[:, None]
        if self._settings.sample:
            torch.manual_seed(self._settings.seed + seed)
        written: Tensor = self._backbone.t5.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=padded),
            attention_mask=mask,
            generation_config=self._config,
            synced_gpus=self.synchronized,
        )
        outputs = [self._tokenizer.decode(self._until_end(ids)) for ids in written.tolist()]
        count = self._settings.num_return_sequences
        return [outputs[first : first + count] for first in range(0, len(outputs), count)]

    @staticmethod
    def _until_end(ids: list[int]) -> list[int]:
        """Without the start token, and without what a synchronized rank wrote behind the end."""
        ids = ids[1:]
        return ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids


def warn_of_other_task(task: Task, loss_task: str, checkpoint: Path) -> None:
    """A line on standard error where `checkpoint` was trained, with `loss_task`, to write something else."""
    if LEARNED.get(loss_task, task) != task:
        print(
            f"atomas: warning: {checkpoint} was trained with loss.task = {loss_task!r}, not for {task}",
            file=sys.stderr,
        )
