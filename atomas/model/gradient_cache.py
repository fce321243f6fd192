"""The contrastive losses of a batch whose activations would not fit: gradient caching.

The pairs of a rank are encoded in micro-batches twice. First without a graph: what the losses read of them is kept,
the losses of the whole global batch are computed from it, and their gradients with regard to it. Then with a graph:
the inner product of a micro-batch's features with their cached gradients has the gradient of the losses (Gao et al.
2021, arXiv 2101.06983, section 3). Memory is set by the micro-batch; what waits of the others is one row per token and
level, on device, host or disk.
"""

from dataclasses import replace

import torch
from torch import Tensor

from atomas.distributed.collectives import all_gather_rows, rank, reduce_scatter_rows
from atomas.distributed.own_block import OwnBlock
from atomas.distributed.partition import Chunks
from atomas.model.alignment import HierarchicalAlignment, Level, gather_lengths, larger_first
from atomas.model.atomas import AtomasModel, Representation
from atomas.model.encoder import Modality
from atomas.model.global_batch import GlobalBatch
from atomas.model.interaction import join_rows, split_rows
from atomas.model.momentum import Keys, MomentumTargets
from atomas.model.polymerization import Clusters
from atomas.model.row_store import RowStore, StorePlace, row_store
from atomas.model.tiles import Side, TiledLevel
from atomas.phases import phase

TILE_PAIRS = 256
"""Pairs of each side in a tile of scores; of one micro-batch, where that has more."""

_Key = tuple[int, Modality]
"""A level of one modality."""


class GradientCache:
    """One global batch: `add` every micro-batch, `close`, then run `cache[number]` of every micro-batch."""

    def __init__(
        self,
        model: AtomasModel,
        everyone: GlobalBatch,
        targets: MomentumTargets | None,
        *,
        micro_batches: int,
        place: StorePlace,
    ) -> None:
        """`targets` are those of all of this rank's pairs; every rank has the same number of micro-batches."""
        self._model, self.everyone, self._targets = model, everyone, targets
        self._place, self._device = place, everyone.sample_id.device
        partition = everyone.partition
        own = [partition.chunk(rank(), number, Chunks(micro_batches)) for number in range(micro_batches)]
        first = partition.own.start
        self._rows = [slice(pairs.start - first, pairs.stop - first) for pairs in own]
        # What is encoded at once makes tiles too small to be worth their reading.
        self._chunks = Chunks(micro_batches, max(1, TILE_PAIRS * micro_batches // max(partition.sizes)))
        self._features: dict[Modality, list[Tensor]] = {"text": [], "smiles": []}
        self._of_features: dict[Modality, Tensor] = {}
        self._levels: dict[_Key, RowStore] = {}
        self._waiting: dict[_Key, list[Tensor]] = {}
        self._lengths: dict[_Key, list[Tensor]] = {}
        self._of_levels: dict[_Key, RowStore] = {}
        self.clusters: list[dict[Modality, list[Clusters]]] = []
        """of every micro-batch"""
        self._of_temperature: Tensor | None = None
        self._of_scale: Tensor | None = None

    def add(self, representation: Representation) -> None:
        """Keep what the losses read of the next micro-batch."""
        for modality, features in representation.features.items():
            self._features[modality].append(features.detach())
        self.clusters.append(
            {
                modality: [
                    Clusters(level.assignment, level.lengths)
                    for level in levels
                    if level.assignment is not None
                ]
                for modality, levels in representation.levels.items()
            }
        )
        for key, level in self._aligned(representation).items():
            if key not in self._levels:
                self._levels[key] = row_store(self._place, self._device)
                self._lengths[key], self._waiting[key] = [], []
            self._lengths[key].append(level.lengths)
            self._waiting[key].append(join_rows(*level.weighted))
            added = len(self._lengths[key])
            if added % self._chunks.per_chunk == 0 or added == self._chunks.micro_batches:
                self._levels[key].append(torch.cat(self._waiting[key]))
                self._waiting[key].clear()

    def close(self) -> dict[str, Tensor]:
        """The contrastive losses and their metrics, as `AtomasModel.forward` gives them. Collective."""
        parts: dict[str, Tensor] = {}
        if self._features["text"]:
            parts |= self._close_global()
        if self._model.alignment is not None:
            parts |= self._close_levels(self._model.alignment)
        return {name: value.detach() for name, value in parts.items()}

    def __getitem__(self, number: int) -> "CachedMicroBatch":
        """What `AtomasModel.forward` takes for one micro-batch."""
        return CachedMicroBatch(self, number)

    def surrogate(self, number: int, representation: Representation) -> Tensor:
        """Scalar with the gradient that the contrastive losses have through micro-batch `number`.

        That of the learned temperatures, which belong to none, comes with the first one.
        """
        products = [
            (features * self._of_features[modality][self._rows[number]]).sum()
            for modality, features in representation.features.items()
        ]
        products += [
            (values * gradient).sum()
            for key, level in self._aligned(representation).items()
            for values, gradient in zip(level.weighted, split_rows(self._of_rows(key, number)), strict=True)
        ]
        if number == 0:
            if self._of_temperature is not None:
                products.append((self._model.clamped_temperature() * self._of_temperature).sum())
            if self._of_scale is not None and self._model.alignment is not None:
                products.append((self._model.alignment.scale() * self._of_scale).sum())
        return torch.stack(products).sum() if products else representation.text_states.new_zeros(())

    def _close_global(self) -> dict[str, Tensor]:
        """L_ga, a micro-batch of rows after the other against all keys."""
        model, everyone, weight = self._model, self.everyone, self._model.loss.global_weight
        sizes = everyone.partition.sizes
        own = {modality: torch.cat(parts) for modality, parts in self._features.items()}
        keys = {
            m: all_gather_rows(rows, sizes, "global features").requires_grad_() for m, rows in own.items()
        }
        online = Keys(text=keys["text"], smiles=keys["smiles"], identities=everyone.identities)
        temperature = model.clamped_temperature().detach().requires_grad_()
        self._of_features = {modality: torch.zeros_like(rows) for modality, rows in own.items()}
        sums: dict[str, Tensor] = {}
        for rows in self._rows:
            text, smiles = (own[m][rows].requires_grad_() for m in ("text", "smiles"))
            targets = self._targets
            if targets is not None:
                targets = replace(targets, text=targets.text[rows], smiles=targets.smiles[rows])
            with torch.enable_grad():
                parts = model.global_parts(text, smiles, targets, online, rows, temperature, everyone)
                (weight * parts["loss/global"]).backward()
            assert text.grad is not None
            assert smiles.grad is not None
            self._of_features["text"][rows] = text.grad
            self._of_features["smiles"][rows] = smiles.grad
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value.detach()
        for modality, everyones in keys.items():
            if everyones.grad is not None:  # the batch's own features are the keys
                of_keys = reduce_scatter_rows(everyones.grad, sizes, "gradient of global features")
                self._of_features[modality] += of_keys
        self._of_temperature = temperature.grad
        return sums | {"temperature": temperature.detach().squeeze(0)}

    def _close_levels(self, alignment: HierarchicalAlignment) -> dict[str, Tensor]:
        everyone, scale = self.everyone, alignment.scale().detach()
        own = {key: torch.cat(parts) for key, parts in self._lengths.items()}
        lengths = gather_lengths(
            {n: (own[n, "text"], own[n, "smiles"]) for n in alignment.level_weights}, everyone
        )
        self._of_scale = torch.zeros_like(scale)
        found = {}
        for number, level_weight in alignment.level_weights.items():
            keys: tuple[_Key, _Key] = (number, "text"), (number, "smiles")
            (own_key, own_lengths), (sent_key, sent_lengths) = larger_first(*keys, lengths[number])
            tiles = TiledLevel(
                Side(rows=self._levels.pop(own_key), lengths=own_lengths),
                Side(rows=self._levels.pop(sent_key), lengths=sent_lengths),
                OwnBlock(scale, everyone.partition, everyone.related, alignment.false_negatives),
                alignment.exchange,
                chunks=self._chunks,
                what=f"tokens of level {number}",
            )
            of_own, of_sent = (row_store(self._place, self._device) for _ in keys)
            weight = scale.new_tensor(level_weight * self._model.loss.hierarchical_weight)
            with phase("interaction"):
                found[number] = tiles.close()
                self._of_scale += tiles.gradient(of_own, of_sent, weight)
            self._of_levels |= {own_key: of_own, sent_key: of_sent}
        return alignment.total(found) | {"logit_scale": scale.squeeze(0)}

    def _of_rows(self, key: _Key, number: int) -> Tensor:
        """[T, D + 1] gradient of the rows of micro-batch `number` at a level."""
        chunk = number // self._chunks.per_chunk
        members = self._chunks.members(chunk)
        sizes = [int(self._lengths[key][member].sum()) for member in members]
        return self._of_levels[key][chunk].split(sizes)[number - members.start]

    def _aligned(self, representation: Representation) -> dict[_Key, Level]:
        if self._model.alignment is None:
            return {}
        return {
            (number, modality): levels[number]
            for number in self._model.alignment.level_weights
            for modality, levels in representation.levels.items()
        }


class CachedMicroBatch:
    """One micro-batch of a closed cache."""

    def __init__(self, cache: GradientCache, number: int) -> None:
        self.everyone, self.clusters = cache.everyone, cache.clusters[number]
        self._cache, self._number = cache, number

    def surrogate(self, found: Representation) -> Tensor:
        """Scalar with the gradient that the contrastive losses have through this micro-batch."""
        return self._cache.surrogate(self._number, found)
