"""Parameters that lie in pieces on the ranks, and whole ones made of the pieces."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atomas.distributed.collectives import all_gather_rows, rank, world_size

BUCKET_ELEMENTS = 16 * 2**20
"""Elements of all ranks together that travel in one all-gather."""


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Consecutive elements of a flattened parameter: the piece that this rank's optimizer owns."""

    shape: tuple[int, ...]
    """of the whole parameter"""
    start: int
    """Number of the first element"""
    size: int
    """Elements: n"""

    @property
    def stop(self) -> int:
        """One behind the last element."""
        return self.start + self.size


@dataclass(frozen=True)
class _Piece:
    parameter: int
    start: int
    stop: int


class FragmentGather:
    """Fills whole parameters with what all ranks hold of them, in buckets of bounded size.

    Each rank's pieces are laid one behind the other, whatever parameters they are of: ranks send equally much then,
    though ZeRO 1 and 2 give a whole parameter to one rank and nothing to the others.
    """

    def __init__(self, wholes: Mapping[str, Tensor], fragments: Mapping[str, Fragment], what: str) -> None:
        """Collective: the ranks tell each other what they hold.

        Args:
            wholes: contiguous parameters, all of one dtype and device, the same on all ranks.
            fragments: pieces of some of them.
            what: name of what travels.
        """
        self._what = what
        self._names = list(wholes)
        self._flat = [whole.view(-1) for whole in wholes.values()]
        held = [fragments.get(name) for name in self._names]
        table = torch.tensor(
            [(0, 0) if piece is None else (piece.start, piece.stop) for piece in held],
            device=self._flat[0].device,
        )
        everyone = all_gather_rows(table, [len(table)] * world_size(), f"layout of {what}")
        self._buckets = [
            list(_buckets(spans, max(1, BUCKET_ELEMENTS // world_size())))
            for spans in everyone.view(world_size(), -1, 2).tolist()
        ]
        self._starts = [0 if piece is None else piece.start for piece in held]

    def __call__(self, pieces: Mapping[str, Tensor]) -> None:
        """`pieces` [n] holds the fragments that the constructor was told of, in any float dtype. Collective."""
        for buckets in itertools.zip_longest(*self._buckets, fillvalue=()):
            mine = [
                pieces[self._names[piece.parameter]][
                    piece.start - self._starts[piece.parameter] : piece.stop - self._starts[piece.parameter]
                ]
                for piece in buckets[rank()]
            ]
            rows = torch.cat([self._flat[0].new_empty(0), *(part.to(self._flat[0]) for part in mine)])
            sizes = [sum(piece.stop - piece.start for piece in bucket) for bucket in buckets]
            received = all_gather_rows(rows, sizes, self._what)
            arrived = [piece for bucket in buckets for piece in bucket]
            torch._foreach_copy_(
                [self._flat[piece.parameter][piece.start : piece.stop] for piece in arrived],
                received.split([piece.stop - piece.start for piece in arrived]),
            )


def _buckets(spans: Sequence[Sequence[int]], size: int) -> Iterator[list[_Piece]]:
    """One rank's spans (start, stop) of every parameter, laid one behind the other and cut every `size` elements."""
    bucket: list[_Piece] = []
    room = size
    for parameter, (start, stop) in enumerate(spans):
        while start < stop:
            cut = min(stop, start + room)
            bucket.append(_Piece(parameter, start, cut))
            room -= cut - start
            start = cut
            if not room:
                yield bucket
                bucket, room = [], size
    if bucket:
        yield bucket
