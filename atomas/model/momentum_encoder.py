"""The slow copy of the encoder, and what it contributes to a step (method section 2).

What is averaged are float32 masters, whatever the run's precision: in bf16 a coefficient of 0.995 would round most
updates away. Each rank keeps those that belong to what its optimizer keeps, so that an update needs no
communication. What runs is a replica in the dtype of the forward pass, made of the masters after each update.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from atomas.config import MomentumConfig
from atomas.data.batching import PairBatch
from atomas.distributed.collectives import world_size
from atomas.distributed.fragments import Fragment, FragmentGather
from atomas.distributed.sharded_weights import shard_weights
from atomas.model.encoder import DualEncoder
from atomas.model.global_batch import GlobalBatch
from atomas.model.momentum import FeatureQueue, Keys, MomentumTargets
from atomas.phases import phase
from atomas_kernels import momentum_update


class Momentum(nn.Module):
    """The slow encoder and the queues. Its parameters have the names they have in `AtomasModel`."""

    def __init__(
        self, encoder: DualEncoder, config: MomentumConfig, *, autocast: torch.dtype | None = None
    ) -> None:
        """Copy the online `encoder` as it is; `autocast` is the dtype of the copy's forward."""
        super().__init__()
        self.encoder = copy.deepcopy(encoder).float().requires_grad_(False)
        self.queue = FeatureQueue(config.queue_size, encoder.backbone.width)
        self.coefficient = config.coefficient
        self.autocast = autocast
        self.masters: dict[str, Tensor] = dict(self.named_parameters())
        """float32, by name: the parameters themselves, or after `shard` this rank's pieces [n] of them"""
        self._features = self.encoder.features
        self._pieces: dict[str, Tensor] = {}
        self._gather: FragmentGather | None = None
        self.eval()

    def train(self, mode: bool = True) -> "Momentum":
        """Stay in evaluation mode: momentum features are computed without dropout."""
        return super().train(False)

    @torch.no_grad()
    def shard(
        self,
        fragments: Mapping[str, Fragment],
        masters: Iterable[Mapping[str, Tensor]],
        *,
        replicated: bool,
        layerwise: bool,
    ) -> None:
        """Keep masters of this rank's `fragments` alone. Collective.

        Args:
            fragments: what this rank's optimizer holds, by name; those that are not of the encoder are ignored.
            masters: their present values, a part at a time; the copy's masters begin with them, where they lie.
            replicated: every rank holds all of it.
            layerwise: keep the copy that runs in pieces too, those of ZeRO stage 3, and gather a layer while it runs.
        """
        if self.autocast is not None:
            self.encoder.to(self.autocast)
            self.autocast = None  # the weights have the dtype now
        wholes: dict[str, Any] = dict(self.named_parameters())
        own = {name: fragments[name] for name in wholes if name in fragments}
        if layerwise:
            self.encoder.backbone.in_step = True
            engine = shard_weights(_Features(self.encoder), kept_whole=0)
            engine.eval()
            self._features = engine.forward  # the method alone: its engine is no submodule of this one
            self._pieces = {name: wholes[name].ds_tensor[: piece.size] for name, piece in own.items()}
        else:
            self._pieces = {
                name: wholes[name].view(-1)[piece.start : piece.stop] for name, piece in own.items()
            }
            if world_size() > 1 and not replicated:
                self._gather = FragmentGather(wholes, own, "momentum weights")
        self.masters = {}
        for part in masters:
            for name in own.keys() & part.keys():
                runs, master = self._pieces[name], part[name]
                same = runs.dtype == master.dtype and runs.device == master.device
                self.masters[name] = runs if same else torch.empty_like(master)
                self.masters[name].copy_(master)
        self.refresh()

    @torch.no_grad()
    def update(self, sources: Iterable[Mapping[str, Tensor]]) -> None:
        """theta_m <- m theta_m + (1 - m) theta, before the momentum features of a step are computed.

        `sources` holds what `masters` follows, a part at a time, under the same names and in the same shapes, best in
        float32; other names are ignored, a missing one is a KeyError. Collective where the masters are sharded.
        """
        with phase("momentum"):
            missing = dict(self.masters)
            for part in sources:
                names = [name for name in part if name in missing]
                masters = [missing.pop(name) for name in names]
                momentum_update(masters, [part[name] for name in names], self.coefficient)
            if missing:
                raise KeyError(f"momentum: nothing to follow for {next(iter(missing))}")
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Make what runs of the masters. Collective where these are sharded and the copy is whole."""
        if self._gather is not None:
            self._gather(self.masters)
            return
        for name, piece in self._pieces.items():
            if piece is not self.masters[name]:
                piece.copy_(self.masters[name])

    @torch.no_grad()
    def targets(self, batch: PairBatch, *, micro_batches: int = 1) -> MomentumTargets:
        """Features of this rank's b pairs, the keys of all ranks, and the queue. Collective.

        The pairs are encoded in so many passes as `micro_batches` says.
        """
        everyone = GlobalBatch.of(batch)
        kind = batch.text.ids.device.type
        with phase("momentum"), torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            features = [self._features(part) for part in batch.split(micro_batches)]
        text, smiles = (torch.cat(parts) for parts in zip(*features, strict=True))
        fresh = Keys.of_all_ranks(text, smiles, everyone)
        return MomentumTargets(
            text=text, smiles=smiles, keys=fresh, everyone=everyone, queue=self.queue.keys()
        )

    @torch.no_grad()
    def enqueue(self, targets: MomentumTargets) -> None:
        """Put the keys that `targets` made into the queue.

        After the backward pass of the batch, which reads the queue as the forward pass did. In the order of the
        corpus, not of the ranks: when the queue wraps, what leaves it must not depend on the world size. Features that
        are not finite, of whatever rank, stay out: they would spoil the steps that follow.
        """
        order = targets.everyone.sample_id.argsort(stable=True)
        finite = (targets.keys.text.isfinite() & targets.keys.smiles.isfinite()).all(dim=1)
        self.queue.push(targets.keys[order[finite[order]]])


class _Features(nn.Module):
    """The forward pass of the copy as a module of its own, which DeepSpeed can follow."""

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        return self.encoder.features(batch)
