"""The sharded part of a checkpoint: masters, moments and momentum masters, each rank's in a file of its own.

shards/rank_0000.safetensors (and rank_0000_001 ... where the optimizer is offloaded to NVMe, so that only a part of it
is in memory at once) holds `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME` and `momentum/NAME`, one-dimensional
fp32 pieces of flattened parameters; its metadata says of which shape a parameter is, where the piece starts, and how
many optimizer steps it has seen. Every element is in exactly one file, so any number of ranks, with other pieces,
can read what they need.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atomas.errors import AtomasError
from atomas.training.shards import OptimizerShard

FOLDER = "shards"


def shard_tensors(
    shard: OptimizerShard, momentum: Mapping[str, Tensor] | None
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """What each of this rank's files holds, and its metadata.

    The tensors are views of what the optimizer goes on to change; with NVMe valid only until the next file.

    Args:
        shard: what this rank's optimizer holds.
        momentum: momentum masters [n] of the same pieces, for those parameters that have one.
    """
    for names in shard.parts():
        tensors: dict[str, Tensor] = {}
        fragments: dict[str, Any] = {}
        for name in names:
            fragment, part = shard.fragments[name], shard.written_part(name)
            if part.start == part.stop:
                continue
            fragments[name] = {
                "shape": fragment.shape,
                "start": fragment.start + part.start,
                "steps": shard.steps(name),
            }
            kinds = {"master": shard.master(name), **shard.moments(name)}
            if momentum is not None and name in momentum:
                kinds["momentum"] = momentum[name].view(-1)
            tensors |= {f"{kind}/{name}": values[part].detach() for kind, values in kinds.items()}
        yield tensors, {"fragments": json.dumps(fragments)}


def shard_file(rank: int, part: int = 0) -> str:
    """Name of a rank's file in a checkpoint."""
    return f"{FOLDER}/rank_{rank:04d}{f'_{part:03d}' if part else ''}.safetensors"


@dataclass
class _Parameter:
    shape: tuple[int, ...]
    steps: int
    pieces: list[tuple[int, Path]] = field(default_factory=list)
    """Start of each piece, and its file"""


class SavedShards:
    """The files that all ranks of a run, of whatever world size, have written: a file is read only where asked for.

    Use `SavedShards.open`.
    """

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self._files = files
        self._parameters: dict[str, _Parameter] = {}
        for path, file in files.items():
            for name, entry in json.loads(file.metadata()["fragments"]).items():
                known = self._parameters.setdefault(name, _Parameter(tuple(entry["shape"]), entry["steps"]))
                known.pieces.append((entry["start"], path))
        self._names = {path: set(file.keys()) for path, file in files.items()}

    @classmethod
    @contextlib.contextmanager
    def open(cls, checkpoint: Path) -> Iterator["SavedShards"]:
        """The shards of a checkpoint.

        Raises:
            AtomasError: there are none, or one cannot be read.
        """
        paths = sorted((checkpoint / FOLDER).glob("rank_*.safetensors"))
        if not paths:
            raise AtomasError(f"checkpoint {checkpoint} holds no optimizer state: no run can continue it")
        try:
            with contextlib.ExitStack() as stack:
                yield cls({path: stack.enter_context(safe_open(path, "pt")) for path in paths})
        except (SafetensorError, OSError) as error:
            raise AtomasError(f"checkpoint {checkpoint} cannot be read: {error}") from error

    def names(self, kind: str) -> list[str]:
        """Parameters of which something is stored as `kind`, in the order of the model."""
        return [
            name
            for name, saved in self._parameters.items()
            if any(f"{kind}/{name}" in self._names[path] for _, path in saved.pieces)
        ]

    def steps(self, name: str) -> int:
        """Optimizer steps that the parameter has seen."""
        return self._parameter(name).steps

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter in its full shape, fp32."""
        shape = self._parameter(name).shape
        values = torch.empty(math.prod(shape))
        self.read(kind, name, shape, 0, values)
        return values.view(shape)

    def read(self, kind: str, name: str, shape: tuple[int, ...], start: int, out: Tensor) -> None:
        """Fill `out` [n] with the elements from `start` on of a parameter that has `shape`.

        Raises:
            AtomasError: the parameter is unknown, has another shape, or elements of it are in no file.
        """
        saved = self._parameter(name)
        if saved.shape != shape:
            raise AtomasError(f"checkpoint: {name} has shape {saved.shape}, the model wants {shape}")
        stop, found = start + out.numel(), 0
        for first, path in saved.pieces:
            key = f"{kind}/{name}"
            if key not in self._names[path]:
                continue
            piece = self._files[path].get_slice(key)
            last = first + piece.get_shape()[0]
            low, high = max(start, first), min(stop, last)
            if low < high:
                out[low - start : high - start].copy_(piece[low - first : high - first])
                found += high - low
        if found != out.numel():
            raise AtomasError(f"checkpoint: {key} lacks {out.numel() - found} of {out.numel()} elements")

    def _parameter(self, name: str) -> _Parameter:
        try:
            return self._parameters[name]
        except KeyError:
            raise AtomasError(f"checkpoint: no weight named {name}; it is of another model") from None


@torch.no_grad()
def read_shard(saved: SavedShards, shard: OptimizerShard, momentum: Mapping[str, Tensor] | None) -> None:
    """Fill this rank's fragments, and its momentum masters of the same pieces, in place.

    The weights of the module are not touched: see `OptimizerShard.give_weights`.
    """
    for names in shard.parts(change=True):
        for name in names:
            shard.reset(name)
        for name in names:
            fragment, steps = shard.fragments[name], saved.steps(name)
            shape, start = fragment.shape, fragment.start
            saved.read("master", name, shape, start, shard.master(name))
            if steps:
                shard.begin_at(name, steps)
                for key, values in shard.moments(name).items():
                    saved.read(key, name, shape, start, values)
            if momentum is not None and name in momentum:
                saved.read("momentum", name, shape, start, momentum[name].view(-1))
