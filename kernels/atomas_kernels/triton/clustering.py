"""Density-peak clustering (kernels.md 3.2): ranks are counted instead of sorted, so there is no sort, no top-k, no
noise and no atomic.

A sequence that fits keeps its whole distance matrix in the registers of one program. A longer one goes through tiles:
norms, densities, separations, ranks and labels, in five kernels that compute the distances again instead of storing
them. Which way a sequence goes, and with which tile, depends on its own length alone, so its labels do not
depend on what it is batched with.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from atomas_kernels import checks
from atomas_kernels.reference.clustering import cluster_counts
from atomas_kernels.triton.tuning import choose
from atomas_kernels.triton.variants import DTYPES, Variant, architecture, launch_options

ROUNDING = tl.constexpr(1e-6)
"""Squared distances below this share of the squared norms are what rounding leaves of equal tokens."""


class Configuration(NamedTuple):
    """Side of the matrix or tile, width of one step of the product, warps and stages."""

    size: int
    width: int
    warps: int
    stages: int

    def constants(self, dtype: str) -> dict[str, Any]:
        """Compile-time constants for tokens of Triton type `dtype`. Products of half-precision numbers are exact in
        float32; float32 ones are made of three tf32 products.
        """
        return {
            "SIZE": self.size,
            "BLOCK_WIDTH": self.width,
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        }

    def options(self) -> dict[str, Any]:
        """Launch options."""
        return launch_options(self.warps, self.stages, maxnreg=255)


def _one_program(architecture: int, dtype: str) -> list[list[Configuration]]:
    """Candidates for each size of sequence that one program takes, in ascending order: whatever no compiler of Triton
    3.6 to 3.9 needs to spill for.
    """
    middle = 32 if dtype == "fp32" or architecture == 80 else 64
    small = [[Configuration(32, 32, 4, 2)], [Configuration(64, middle, 4, 2)]]
    if dtype == "fp32" and architecture == 80:
        return small
    return [*small, [Configuration(128, 16 if dtype == "fp32" else 32, 8, 2)]]


def _tiled(architecture: int, dtype: str) -> list[Configuration]:
    if dtype == "fp32":
        return [Configuration(32, 32, 4, 2)] if architecture == 80 else [Configuration(64, 32, 8, 2)]
    return [Configuration(64, 64, 8, 2)]


def dpc_knn(tokens: Tensor, lengths: Tensor, *, ratio: float, k: int) -> tuple[Tensor, Tensor]:
    """See `atomas_kernels.dpc_knn`. Distances by the Gram form, as good as in float32."""
    counts = cluster_counts(lengths, ratio)
    assignment: Tensor = _cluster(tokens.contiguous(), lengths, counts, k)
    return assignment, counts


@custom_op("atomas_kernels::triton_dpc_knn", mutates_args=())
def _cluster(tokens: Tensor, lengths: Tensor, counts: Tensor, k: int) -> Tensor:
    sizes = checks.segment_sizes("lengths", lengths, len(tokens))
    batch = _Batch(tokens, lengths, counts, k, sizes)
    assignment = lengths.new_empty(len(tokens))
    place, dtype = architecture(tokens.device), batch.dtype()
    shorter = 0
    for candidates in _one_program(place, dtype):
        longest = candidates[0].size
        if any(shorter < size <= longest for size in sizes):
            key = (*batch.signature(), longest)
            best = choose(key, candidates, lambda c, low=shorter: _cluster_short(batch, low, assignment, c))  # type: ignore[misc]
            _cluster_short(batch, shorter, assignment, best)
        shorter = longest
    if max(sizes, default=0) > shorter:
        candidates = _tiled(place, dtype)
        key = (*batch.signature(), max(sizes))
        best = choose(key, candidates, lambda c: _cluster_long(batch, shorter, assignment, c))
        _cluster_long(batch, shorter, assignment, best)
    return assignment


@_cluster.register_fake
def _(tokens: Tensor, lengths: Tensor, counts: Tensor, k: int) -> Tensor:
    return lengths.new_empty(len(tokens))


class _Batch(NamedTuple):
    tokens: Tensor
    lengths: Tensor
    counts: Tensor
    k: int
    sizes: list[int]

    def dtype(self) -> str:
        """Triton's name of the tokens' dtype."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.tokens.dtype]

    def signature(self) -> tuple[Any, ...]:
        """What the fastest configuration may depend on."""
        return self.tokens.device, self.dtype(), self.tokens.shape[1], triton.next_power_of_2(len(self.sizes))


def _cluster_short(batch: _Batch, shorter: int, assignment: Tensor, best: Configuration) -> None:
    """Labels of the sequences of more than `shorter` and at most `best.size` tokens."""
    tokens, lengths = batch.tokens, batch.lengths
    arguments = (
        tokens,
        lengths,
        lengths.cumsum(0),
        batch.counts,
        assignment,
        shorter,
        tokens.shape[1],
        batch.k,
    )
    cluster_kernel[(len(lengths),)](*arguments, **best.constants(batch.dtype()), **best.options())


def _cluster_long(batch: _Batch, shorter: int, assignment: Tensor, best: Configuration) -> None:
    """Labels of the sequences of more than `shorter` tokens, through tiles."""
    tokens, width = batch.tokens, batch.tokens.shape[1]
    grid = (triton.cdiv(max(batch.sizes), best.size), len(batch.lengths))
    where = (batch.lengths, batch.lengths.cumsum(0), shorter)
    norm, spread, separation, reach = tokens.new_empty(4, len(tokens), dtype=torch.float32)
    rank, centre = torch.empty(2, len(tokens), dtype=torch.int32, device=tokens.device)
    product = best.constants(batch.dtype()) | best.options()
    slots = max(4, triton.next_power_of_2(batch.k))
    counting = {"SIZE": best.size} | best.options()

    norm_kernel[grid](tokens, *where, width, norm, **product)
    spread_kernel[grid](tokens, *where, width, batch.k, norm, spread, SLOTS=slots, **product)
    separation_kernel[grid](tokens, *where, width, norm, spread, separation, reach, **product)
    rank_kernel[grid](*where, width, spread, separation, reach, rank, centre, **counting)
    label_kernel[grid](tokens, *where, width, batch.counts, norm, rank, centre, assignment, **product)


@triton.jit
def _gram(  # type: ignore[no-untyped-def]
    tokens,
    row,
    column,
    row_inside,
    column_inside,
    width,
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Inner products of the tokens `row` with the tokens `column`, both int64; 0 outside."""
    gram = tl.zeros((row.shape[0], column.shape[0]), dtype=tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        place = first + tl.arange(0, BLOCK_WIDTH)
        inside = (place < width)[None, :]
        x = tl.load(
            tokens + row[:, None] * width + place[None, :], mask=row_inside[:, None] & inside, other=0.0
        )
        y = tl.load(
            tokens + column[:, None] * width + place[None, :], mask=column_inside[:, None] & inside, other=0.0
        )
        gram = tl.dot(x, tl.trans(y), gram, input_precision=PRECISION)
    return gram


@triton.jit
def _diagonal(gram, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Squared norms from the product itself, rounded alike."""
    row = tl.arange(0, SIZE)
    return tl.sum(tl.where(row[:, None] == row[None, :], gram, 0.0), axis=1)


@triton.jit
def _square(gram, row_norm, column_norm, inside):  # type: ignore[no-untyped-def]
    """Squared distances; 0 for equal tokens, infinity for NaN and outside."""
    both = row_norm[:, None] + column_norm[None, :]
    square = both - 2 * gram
    # An infinite distance is no more than a share of an infinite norm, and stays infinite.
    square = tl.where(square <= tl.minimum(ROUNDING * both, 3e38), 0.0, square)
    square = tl.where(square == square, square, float("inf"))
    return tl.where(inside, square, float("inf"))


@triton.jit
def _next_nearest(square, last, place):  # type: ignore[no-untyped-def]
    """The smallest entry of each row behind (last, place) in order of (distance, index), and its index: what was
    taken is told from the last one alone, so that no second matrix has to be kept.
    """
    column = tl.arange(0, square.shape[1])[None, :]
    left = (square > last[:, None]) | ((square == last[:, None]) & (column > place[:, None]))
    return tl.min(tl.where(left, square, float("inf")), axis=1, return_indices=True)


@triton.jit
def _mean_of_nearest(square, neighbours, width):  # type: ignore[no-untyped-def]
    """Mean of the `neighbours` smallest of each row over width, added in ascending order."""
    total = tl.zeros((square.shape[0],), dtype=tl.float32)
    last = total - 1
    place = tl.zeros((square.shape[0],), dtype=tl.int32)
    for _ in range(neighbours):
        last, place = _next_nearest(square, last, place)
        total += last
    return total / (neighbours * width).to(tl.float32)


@triton.jit
def _importance(spread, separation, width, inside):  # type: ignore[no-untyped-def]
    """Density times separation; NaN counts as 0, a place outside comes behind every token."""
    importance = tl.exp(-spread) * tl.sqrt(separation / width)
    return tl.where(inside, tl.where(importance == importance, importance, 0.0), -1.0)


@triton.jit
def cluster_kernel(  # type: ignore[no-untyped-def]
    tokens,
    lengths,
    ends,
    counts,
    assignment,
    shorter,
    width,
    k,
    SIZE: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Labels of one sequence of more than `shorter` and at most SIZE tokens; others are left alone."""
    sequence = tl.program_id(0)
    n = tl.load(lengths + sequence).to(tl.int32)
    if n > shorter and n <= SIZE:
        begin = tl.load(ends + sequence) - n
        clusters = tl.load(counts + sequence).to(tl.int32)
        row = tl.arange(0, SIZE)
        i, j, exists = row[:, None], row[None, :], row < n
        inside = exists[:, None] & exists[None, :]
        gram = _gram(tokens, begin + row, begin + row, exists, exists, width, BLOCK_WIDTH, PRECISION)
        norm = _diagonal(gram, SIZE)
        square = _square(gram, norm, norm, inside)

        spread = _mean_of_nearest(square, tl.minimum(k, n), width)
        own, other = spread[:, None], spread[None, :]
        # Places behind the end have infinite spread: they come before no token.
        denser = (other < own) | ((other == own) & (j < i))
        separation = tl.min(tl.where(denser, square, float("inf")), axis=1)
        farthest = tl.max(tl.where(inside, square, 0.0), axis=1)
        # The same for every row: Triton 3.6 cannot reduce a vector to a number here on sm_100.
        largest = tl.max(tl.broadcast_to(farthest[None, :], (SIZE, SIZE)), axis=1)
        densest = tl.max(denser.to(tl.int32), axis=1) == 0
        importance = _importance(spread, tl.where(densest, largest, separation), width, exists)

        own, other = importance[:, None], importance[None, :]
        rank = tl.sum(((other > own) | ((other == own) & (j < i))).to(tl.int32), axis=1)
        is_centre = exists & (rank < clusters)
        to_centre = tl.where(is_centre[None, :], square, float("inf"))
        nearest = tl.min(to_centre, axis=1)
        candidates = tl.where(is_centre[None, :] & (to_centre == nearest[:, None]), rank[None, :], SIZE)
        label = tl.where(is_centre, rank, tl.min(candidates, axis=1))
        tl.store(assignment + begin + row, label.to(tl.int64), mask=exists)


@triton.jit
def _rows(lengths, ends, shorter, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The tile of this program: length (0 if the tile has nothing to do) and first token of its sequence, its rows
    within the sequence.
    """
    sequence = tl.program_id(1)
    n = tl.load(lengths + sequence).to(tl.int32)
    begin = tl.load(ends + sequence) - n
    first = tl.program_id(0) * SIZE
    return tl.where((n > shorter) & (first < n), n, 0), begin, first + tl.arange(0, SIZE)


@triton.jit
def norm_kernel(  # type: ignore[no-untyped-def]
    tokens,
    lengths,
    ends,
    shorter,
    width,
    norm,
    SIZE: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Squared norm of every token, to `norm` [T]."""
    n, begin, row = _rows(lengths, ends, shorter, SIZE)
    if n > 0:
        gram = _gram(tokens, begin + row, begin + row, row < n, row < n, width, BLOCK_WIDTH, PRECISION)
        tl.store(norm + begin + row, _diagonal(gram, SIZE), mask=row < n)


@triton.jit
def _square_tile(  # type: ignore[no-untyped-def]
    tokens,
    norm,
    begin,
    n,
    row,
    column,
    width,
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Squared distances of some tokens of a sequence, by their place in it."""
    row_inside, column_inside = row < n, column < n
    gram = _gram(
        tokens, begin + row, begin + column, row_inside, column_inside, width, BLOCK_WIDTH, PRECISION
    )
    row_norm = tl.load(norm + begin + row, mask=row_inside, other=0.0)
    column_norm = tl.load(norm + begin + column, mask=column_inside, other=0.0)
    return _square(gram, row_norm, column_norm, row_inside[:, None] & column_inside[None, :])


@triton.jit
def spread_kernel(  # type: ignore[no-untyped-def]
    tokens,
    lengths,
    ends,
    shorter,
    width,
    k,
    norm,
    spread,
    SLOTS: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Mean squared distance over width to the k nearest, to `spread` [T]; k <= SLOTS."""
    n, begin, row = _rows(lengths, ends, shorter, SIZE)
    neighbours = tl.minimum(k, n)
    nearest = tl.full((SIZE, SLOTS), float("inf"), dtype=tl.float32)
    slots = tl.arange(0, SLOTS)[None, :]
    for first in range(0, n, SIZE):
        column = first + tl.arange(0, SIZE)
        square = _square_tile(tokens, norm, begin, n, row, column, width, BLOCK_WIDTH, PRECISION)
        last = tl.full((SIZE,), -1.0, dtype=tl.float32)
        place = tl.zeros((SIZE,), dtype=tl.int32)
        for _ in range(neighbours):
            last, place = _next_nearest(square, last, place)
            _, slot = tl.max(nearest, axis=1, return_indices=True)
            better = (slots == slot[:, None]) & (last[:, None] < nearest)
            nearest = tl.where(better, last[:, None], nearest)
    if n > 0:
        tl.store(spread + begin + row, _mean_of_nearest(nearest, neighbours, width), mask=row < n)


@triton.jit
def separation_kernel(  # type: ignore[no-untyped-def]
    tokens,
    lengths,
    ends,
    shorter,
    width,
    norm,
    spread,
    separation,
    reach,
    SIZE: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Squared distance to the nearest denser token, -1 for the densest, to `separation` [T]; to the farthest token,
    to `reach` [T].
    """
    n, begin, row = _rows(lengths, ends, shorter, SIZE)
    own = tl.load(spread + begin + row, mask=row < n, other=0.0)[:, None]
    nearest = tl.full((SIZE,), float("inf"), dtype=tl.float32)
    farthest = tl.zeros((SIZE,), dtype=tl.float32)
    denser_tokens = tl.zeros((SIZE,), dtype=tl.int32)
    for first in range(0, n, SIZE):
        column = first + tl.arange(0, SIZE)
        square = _square_tile(tokens, norm, begin, n, row, column, width, BLOCK_WIDTH, PRECISION)
        exists = (column < n)[None, :]
        other = tl.load(spread + begin + column, mask=column < n, other=0.0)[None, :]
        denser = exists & ((other < own) | ((other == own) & (column[None, :] < row[:, None])))
        nearest = tl.minimum(nearest, tl.min(tl.where(denser, square, float("inf")), axis=1))
        farthest = tl.maximum(farthest, tl.max(tl.where(exists, square, 0.0), axis=1))
        denser_tokens += tl.sum(denser.to(tl.int32), axis=1)
    tl.store(separation + begin + row, tl.where(denser_tokens > 0, nearest, -1.0), mask=row < n)
    tl.store(reach + begin + row, farthest, mask=row < n)


@triton.jit
def rank_kernel(  # type: ignore[no-untyped-def]
    lengths,
    ends,
    shorter,
    width,
    spread,
    separation,
    reach,
    rank,
    centre,
    SIZE: tl.constexpr,  # noqa: N803
):
    """How many tokens of the sequence are more important than each, to `rank` [T], and the token of each rank, to
    `centre` [T].
    """
    n, begin, row = _rows(lengths, ends, shorter, SIZE)
    farthest = tl.zeros((SIZE,), dtype=tl.float32)
    for first in range(0, n, SIZE):
        column = first + tl.arange(0, SIZE)
        farthest = tl.maximum(farthest, tl.load(reach + begin + column, mask=column < n, other=0.0))
    largest = tl.max(farthest, axis=0)

    own = _load_importance(spread, separation, largest, begin, row, n, width)[:, None]
    before = tl.zeros((SIZE,), dtype=tl.int32)
    for first in range(0, n, SIZE):
        column = first + tl.arange(0, SIZE)
        other = _load_importance(spread, separation, largest, begin, column, n, width)[None, :]
        more = (other > own) | ((other == own) & (column[None, :] < row[:, None]))
        before += tl.sum(more.to(tl.int32), axis=1)
    tl.store(rank + begin + row, before, mask=row < n)
    tl.store(centre + begin + before, row, mask=row < n)


@triton.jit
def _load_importance(spread, separation, largest, begin, place, n, width):  # type: ignore[no-untyped-def]
    inside = place < n
    nearest = tl.load(separation + begin + place, mask=inside, other=0.0)
    nearest = tl.where(nearest < 0, largest, nearest)
    return _importance(tl.load(spread + begin + place, mask=inside, other=0.0), nearest, width, inside)


@triton.jit
def label_kernel(  # type: ignore[no-untyped-def]
    tokens,
    lengths,
    ends,
    shorter,
    width,
    counts,
    norm,
    rank,
    centre,
    assignment,
    SIZE: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """The nearest centre of every token, the lower cluster of equally near ones, to `assignment` [T]."""
    n, begin, row = _rows(lengths, ends, shorter, SIZE)
    clusters = tl.where(n > 0, tl.load(counts + tl.program_id(1)).to(tl.int32), 0)
    nearest = tl.full((SIZE,), float("inf"), dtype=tl.float32)
    label = tl.zeros((SIZE,), dtype=tl.int32)
    for first in range(0, clusters, SIZE):
        cluster = first + tl.arange(0, SIZE)
        column = tl.load(centre + begin + cluster, mask=cluster < clusters, other=n)
        square = _square_tile(tokens, norm, begin, n, row, column, width, BLOCK_WIDTH, PRECISION)
        distance, place = tl.min(square, axis=1, return_indices=True)
        label = tl.where(distance < nearest, first + place, label)
        nearest = tl.minimum(nearest, distance)
    own = tl.load(rank + begin + row, mask=row < n, other=0)
    tl.store(assignment + begin + row, tl.where(own < clusters, own, label).to(tl.int64), mask=row < n)


def variants(architecture: int) -> Iterator[Variant]:
    """Every kernel with every candidate and dtype; up to four neighbours in tiles, more only in experiments."""
    pointers = dict.fromkeys(("lengths", "ends", "counts", "assignment"), "*i64")
    pointers |= dict.fromkeys(("norm", "spread", "separation", "reach"), "*fp32")
    types = pointers | {"rank": "*i32", "centre": "*i32", "shorter": "i32", "k": "i32", "width": "i32:16"}

    def variant(kernel: Any, constants: dict[str, Any], best: Configuration, *parts: object) -> Variant:
        names = types | {"tokens": f"*{parts[0]}"}
        return Variant(
            name=f"dpc_knn_{kernel.__name__.removesuffix('_kernel')}[{','.join(map(str, parts))}]",
            kernel=kernel,
            signature={name: names[name] for name in kernel.arg_names if name not in constants},
            constants=constants,
            options=best.options(),
            tensor_cores="PRECISION" in constants,
        )

    for dtype in ("bf16", *(other for other in DTYPES if other != "bf16")):
        for candidates in reversed(_one_program(architecture, dtype)):
            for best in candidates:
                yield variant(cluster_kernel, best.constants(dtype), best, dtype, *best)
        for best in _tiled(architecture, dtype):
            constants = best.constants(dtype)
            yield variant(norm_kernel, constants, best, dtype, *best)
            yield variant(spread_kernel, constants | {"SLOTS": 4}, best, dtype, *best)
            yield variant(separation_kernel, constants, best, dtype, *best)
            yield variant(label_kernel, constants, best, dtype, *best)
            yield variant(rank_kernel, {"SIZE": best.size}, best, dtype, *best)
