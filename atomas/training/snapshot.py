"""What a checkpoint holds: taken from a session at one step, written when there is time, given back to a session."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from atomas.data.order import ORDER_VERSION
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.training.model_files import write_model
from atomas.training.shard_files import SavedShards, read_shard, shard_file, shard_tensors
from atomas.training.tensor_files import write_tensors

if TYPE_CHECKING:
    from atomas.training.session import Session

QUEUE = "queue.safetensors"
TRAINER = "trainer.json"

File = tuple[str, dict[str, Tensor], dict[str, str]]
"""Name in the checkpoint, tensors and metadata"""


class HostCopies:
    """Host memory for a snapshot, kept for the next one: who had room for the first has room for all."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors of a file, valid until the file is copied again."""
        copies = {}
        for name, tensor in tensors.items():
            key = f"{file}/{name}"
            held = self._held.get(key)
            if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._held[key] = held
            copies[name] = held.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One rank's part of a checkpoint, and on rank 0 what is written once."""

    step: int
    files: Callable[[], Iterator[File]]
    """Of this rank; the tensors of one may be there only until the next"""
    session: "Session"
    """Read for what does not change during a run"""
    trainer: dict[str, Any]

    @classmethod
    def take(cls, session: "Session", trainer: dict[str, Any], copies: HostCopies | None) -> "Snapshot":
        """Of the present step; without `copies` valid only until the next one. Not collective."""
        rank, momentum = session.placement.rank, session.momentum
        random_state = {"cpu": torch.get_rng_state()}
        if session.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(session.device)

        def files() -> Iterator[File]:
            masters = None if momentum is None else momentum.masters
            for number, (tensors, about) in enumerate(shard_tensors(session.shard, masters)):
                yield shard_file(rank, number), tensors, about
            yield _random_file(rank), random_state, {}
            if momentum is not None and rank == 0:
                yield QUEUE, dict(momentum.queue.named_buffers()), {}

        if copies is None:
            return cls(step=session.step, files=files, session=session, trainer=trainer)
        copied = [(name, copies(name, tensors), about) for name, tensors, about in files()]
        return cls(step=session.step, files=lambda: iter(copied), session=session, trainer=trainer)

    def write_part(self, folder: Path) -> list[str]:
        """Write this rank's files; their names. Needs no other rank."""
        names = []
        for name, tensors, metadata in self.files():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / name, tensors, metadata)
            names.append(name)
        return names

    def write_rest(self, folder: Path) -> None:
        """Write, on rank 0, what follows from the parts of all ranks, which must be there."""
        session = self.session
        with SavedShards.open(folder) as saved:  # nothing has to be gathered
            weights = {name: saved.whole("master", name) for name in saved.names("master")}
            slow = None
            if session.momentum is not None:
                slow = {name: saved.whole("momentum", name) for name in saved.names("momentum")}
            t5_config = session.engine.module.encoder.backbone.t5.config
            write_model(folder / "model", session.config, t5_config, weights, slow, session.tokenizer)
        write_json(folder / TRAINER, self.trainer)


def read_trainer(checkpoint: Path) -> dict[str, Any]:
    """The part of a checkpoint that is not tensors.

    Raises:
        AtomasError: it cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / TRAINER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AtomasError(f"{checkpoint / TRAINER} cannot be read: {error}") from None
    return state


def saved_in_doubt(checkpoint: Path) -> bool:
    """It was asked for while the losses jumped. One that cannot be read is not in doubt, but damaged."""
    try:
        return bool(read_trainer(checkpoint).get("in_doubt", False))
    except AtomasError:
        return False


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        AtomasError: it cannot be read.
    """
    try:
        return load_file(checkpoint / name)
    except (OSError, SafetensorError) as error:
        raise AtomasError(f"{checkpoint / name} cannot be read: {error}") from None


def restore(session: "Session", checkpoint: Path, trainer: Mapping[str, Any]) -> None:
    """Give a rank what it holds of a checkpoint that any number of ranks may have written, whatever their ZeRO stage.

    Not collective; the module's weights and the momentum copy that runs are the caller's to refresh.
    """
    momentum = session.momentum
    with SavedShards.open(checkpoint) as saved:
        read_shard(saved, session.shard, None if momentum is None else momentum.masters)
    session.shard.set_scale(trainer["loss_scale"])
    if momentum is not None:
        for name, value in read_tensors(checkpoint, QUEUE).items():
            getattr(momentum.queue, name).copy_(value)
        momentum.queue.set_extra_state(trainer["queue"])
    rank = session.placement.rank
    if trainer["world_size"] != session.placement.world_size:
        seed_dropout(session.config.run.seed, trainer["step"], rank)
        return
    random_state = read_tensors(checkpoint, _random_file(rank))
    torch.set_rng_state(random_state["cpu"])
    if session.device.type == "cuda":
        torch.cuda.set_rng_state(random_state["cuda"], session.device)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Another dropout on every rank, and another where a run goes on with other ranks."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def identity(session: "Session") -> dict[str, Any]:
    """What must not change between the attempts of one run."""
    config = session.config
    data = (
        "batch_size",
        "window_blocks",
        "group_shards",
        "train_split",
        "max_text_tokens",
        "max_smiles_tokens",
    )
    return {
        "order": ORDER_VERSION,
        "corpus": session.corpora.fingerprint,
        "tokenizer": session.tokenizer.fingerprint,
        "training.gradient_accumulation_steps": config.training.gradient_accumulation_steps,
        "run.seed": config.run.seed,
        **{f"data.{key}": getattr(config.data, key) for key in data},
        **{
            f"{section}.{key}": list(value) if isinstance(value, tuple) else value
            for section in ("model", "loss", "momentum")
            for key, value in dataclasses.asdict(getattr(config, section)).items()
            if key not in ("activation_checkpointing", "exchange", "forward")
        },
    }


def check_identity(saved: Mapping[str, Any], present: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to continue another run.

    Raises:
        AtomasError: names the first thing that has changed.
    """
    for key, value in present.items():
        if saved.get(key) != value:
            raise AtomasError(
                f"{checkpoint.name} was written with {key} = {saved.get(key)!r}, this run has {value!r}; set it back, "
                "or start a new run with another run.name"
            )


def _random_file(rank: int) -> str:
    return f"rng/rank_{rank:04d}.safetensors"
