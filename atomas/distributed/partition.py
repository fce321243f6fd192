"""How the pairs of a global batch lie on the ranks."""

from dataclasses import dataclass
from math import ceil

import torch

from atomas.distributed.collectives import all_gather_sizes, rank


@dataclass(frozen=True)
class Partition:
    """Rank r holds `sizes[r]` of the B pairs; pairs are numbered 0, ..., B - 1 in rank order."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, count: int, device: torch.device) -> "Partition":
        """The partition in which this rank holds `count` pairs. Collective."""
        return cls(tuple(all_gather_sizes(count, device, "number of pairs")))

    @property
    def total(self) -> int:
        """B."""
        return sum(self.sizes)

    @property
    def world_size(self) -> int:
        """W."""
        return len(self.sizes)

    @property
    def own(self) -> slice:
        """Numbers of this rank's pairs."""
        return self.pairs_of(rank())

    def pairs_of(self, owner: int) -> slice:
        """Numbers of the pairs of rank `owner`."""
        start = sum(self.sizes[:owner])
        return slice(start, start + self.sizes[owner])

    def chunk(self, owner: int, number: int, chunks: "Chunks") -> slice:
        """Numbers of the pairs in chunk `number` of rank `owner`."""
        pairs, parts = self.pairs_of(owner), chunks.members(number)
        return slice(
            *(
                pairs.start + self.sizes[owner] * place // chunks.micro_batches
                for place in (parts.start, parts.stop)
            )
        )


@dataclass(frozen=True)
class Chunks:
    """How the pairs of each rank are cut: into nearly equal micro-batches, some of which in a row make a chunk."""

    micro_batches: int = 1
    per_chunk: int = 1

    def __len__(self) -> int:
        """Return how many chunks there are."""
        return ceil(self.micro_batches / self.per_chunk)

    def members(self, number: int) -> range:
        """Numbers of the micro-batches in a chunk."""
        start = number * self.per_chunk
        return range(start, min(start + self.per_chunk, self.micro_batches))
