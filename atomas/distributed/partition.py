"""How the pairs of a global batch lie on the ranks."""

from dataclasses import dataclass

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

    def chunk(self, owner: int, number: int, count: int) -> slice:
        """Numbers of the pairs in chunk `number` of `count` nearly equal chunks of rank `owner`."""
        pairs = self.pairs_of(owner)
        return slice(*(pairs.start + self.sizes[owner] * place // count for place in (number, number + 1)))
