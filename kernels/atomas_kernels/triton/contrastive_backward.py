"""Backward kernels of the contrastive cross entropy.

The tiles of the forward pass are computed again; each program owns some rows and a range of tiles, and adds into
memory of its own, so there is no atomic and every run gives the same bits.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomas_kernels.triton.contrastive_tiles import (
    Configuration,
    Operands,
    gradient_of_logits,
    key_types,
    load,
    logits,
    variant,
)
from atomas_kernels.triton.tuning import choose
from atomas_kernels.triton.variants import Variant, architecture

_PROGRAMS = 264
"""Programs that the backward pass aims at: two for each of the 132 multiprocessors of an H100. A constant, so that
results do not depend on the card.
"""


def candidates(architecture: int, dtype: str) -> list[Configuration]:
    """Configurations for a compute capability and a query type, the static choice first."""
    if dtype == "fp32":
        return [Configuration(64, 32, 32, 8, 2)]
    if architecture == 100:
        return [Configuration(64, 64, 64, 8, 3)]
    return [Configuration(64, 128, 64, 8, 3), Configuration(64, 64, 64, 8, 3)]


def run(
    operands: Operands, alpha: float, statistics: Tensor, *, need_keys: bool
) -> tuple[Tensor, Tensor | None]:
    """Sums over keys and rows of gradient x key [b, D] and gradient x query [M, D], unscaled, float32; the second
    one only on demand.
    """
    found = candidates(architecture(operands.query.device), operands.dtype())
    key = ("backward", operands.signature())
    best = choose(key, found, lambda c: _query_gradient(operands, alpha, statistics, c))
    grad_query = _query_gradient(operands, alpha, statistics, best)
    return grad_query, _key_gradient(operands, alpha, statistics, best) if need_keys else None


def _query_gradient(operands: Operands, alpha: float, statistics: Tensor, best: Configuration) -> Tensor:
    """Sum over the keys of gradient x key [b, D]; unscaled, float32."""
    query = operands.query
    sources = operands.sources()
    row_blocks = triton.cdiv(len(query), best.rows)
    tiles = [triton.cdiv(len(source), best.keys) for source in sources]
    per_split = [triton.cdiv(count, max(1, _PROGRAMS // row_blocks)) for count in tiles]
    splits = [triton.cdiv(count, each) for count, each in zip(tiles, per_split, strict=True)]
    partial = query.new_empty(sum(splits), *query.shape, dtype=torch.float32)
    constants = best.constants(operands.dtype()) | best.options()
    for source, each, part in zip(sources, per_split, partial.split(splits), strict=True):
        arguments = (*operands.arguments(source), statistics, alpha, each, part)
        query_gradient_kernel[(len(part), row_blocks)](*arguments, **constants)
    return partial.sum(0)


def _key_gradient(operands: Operands, alpha: float, statistics: Tensor, best: Configuration) -> Tensor:
    """Sum over the rows of gradient x query [M, D]; unscaled, float32."""
    grad_keys = torch.empty_like(operands.keys, dtype=torch.float32)
    grid = (triton.cdiv(len(operands.keys), best.keys),)
    arguments = (*operands.arguments(operands.keys), statistics, alpha, grad_keys)
    key_gradient_kernel[grid](*arguments, **best.constants(operands.dtype()), **best.options())
    return grad_keys


@triton.jit
def _accumulate(  # type: ignore[no-untyped-def]
    gradient,
    source,
    key,
    count,
    width,
    target,
    row,
    rows,
    add,
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Product gradient [rows, keys] @ source [keys, width] into `target` [.., width] float32: added where
    `add`, stored otherwise.
    """
    for first in range(0, width, BLOCK_WIDTH):
        place = first + tl.arange(0, BLOCK_WIDTH)
        k = load(source, key, count, first, width, BLOCK_WIDTH).to(gradient.dtype)
        product = tl.dot(gradient, k, input_precision=PRECISION)
        at = target + row[:, None].to(tl.int64) * width + place[None, :]
        inside = (row[:, None] < rows) & (place[None, :] < width)
        if add:
            product += tl.load(at, mask=inside, other=0.0)
        tl.store(at, product, mask=inside)


@triton.jit
def query_gradient_kernel(  # type: ignore[no-untyped-def]
    query,
    momentum,
    source,
    temperature,
    positive,
    ignore,
    rows,
    count,
    offset,
    ignore_stride,
    width,
    statistics,
    alpha,
    per_split,
    partial,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_KEYS: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Some rows with `per_split` tiles of keys: sum of gradient x key to `partial` [splits, b, D]."""
    split = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    target = partial + split.to(tl.int64) * rows * width
    begin = split * per_split * BLOCK_KEYS
    for first in range(begin, tl.minimum(begin + per_split * BLOCK_KEYS, count), BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        x, y, own = logits(
            query,
            momentum,
            source,
            temperature,
            positive,
            ignore,
            rows,
            count,
            offset,
            ignore_stride,
            width,
            row,
            key,
            BLOCK_WIDTH,
            PRECISION,
        )
        gradient = gradient_of_logits(x, y, own, statistics, row, rows, alpha)
        gradient = gradient.to(query.dtype.element_ty)
        # A thread may read what another one wrote for the tile before.
        tl.debug_barrier()
        _accumulate(
            gradient, source, key, count, width, target, row, rows, first != begin, BLOCK_WIDTH, PRECISION
        )


@triton.jit
def key_gradient_kernel(  # type: ignore[no-untyped-def]
    query,
    momentum,
    source,
    temperature,
    positive,
    ignore,
    rows,
    count,
    offset,
    ignore_stride,
    width,
    statistics,
    alpha,
    grad_keys,
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_KEYS: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """One tile of keys with every row: sum of gradient x query to `grad_keys` [M, D]."""
    key = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        x, y, own = logits(
            query,
            momentum,
            source,
            temperature,
            positive,
            ignore,
            rows,
            count,
            offset,
            ignore_stride,
            width,
            row,
            key,
            BLOCK_WIDTH,
            PRECISION,
        )
        gradient = gradient_of_logits(x, y, own, statistics, row, rows, alpha)
        gradient = tl.trans(gradient.to(query.dtype.element_ty))
        tl.debug_barrier()
        _accumulate(
            gradient, query, row, rows, width, grad_keys, key, count, first != 0, BLOCK_WIDTH, PRECISION
        )


def variants(architecture: int) -> Iterator[Variant]:
    """Every kernel with every candidate and dtype."""
    for dtype in ("bf16", "fp16", "fp32"):
        for best in candidates(architecture, dtype):
            for source in key_types(dtype):
                yield variant(query_gradient_kernel, dtype, source, best)
            yield variant(key_gradient_kernel, dtype, dtype, best)
