"""What both passes of the contrastive cross entropy share: operands, configurations and the logits of a tile."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomas_kernels.triton.variants import DTYPES, Variant, launch_options

MASKED = tl.constexpr(-1e30)
"""Logit of a key that does not count: finite, so that a tile of nothing else needs no special case."""

TYPES = (
    {"temperature": "*fp32", "positive": "*i64", "ignore": "*u8", "statistics": "*fp32", "alpha": "fp32"}
    | {"width": "i32:16", "ignore_stride": "i32:16"}
    | dict.fromkeys(("rows", "count", "offset", "tiles", "per_split"), "i32")
    | dict.fromkeys(("partial", "own_logit", "loss", "grad_keys"), "*fp32")
)
"""Triton types of the kernels' arguments but for queries and keys."""


class Configuration(NamedTuple):
    """Rows and keys of a tile, width of one step of a product, warps and stages."""

    rows: int
    keys: int
    width: int
    warps: int
    stages: int

    def constants(self, dtype: str) -> dict[str, Any]:
        """Compile-time constants for queries of Triton type `dtype`."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_KEYS": self.keys,
            "BLOCK_WIDTH": self.width,
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        }

    def options(self) -> dict[str, Any]:
        """Launch options."""
        return launch_options(self.warps, self.stages, maxnreg=255)


class Operands(NamedTuple):
    """What both passes read."""

    query: Tensor
    momentum: Tensor
    keys: Tensor
    temperature: Tensor
    positive: Tensor
    queue: Tensor | None
    ignore: Tensor | None

    def dtype(self) -> str:
        """Triton's name of the query's dtype."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.query.dtype]

    def signature(self) -> tuple[Any, ...]:
        """What the fastest configuration may depend on; the batch by its power of two."""
        queue = self.queue
        sizes = tuple(triton.next_power_of_2(len(x)) for x in (self.query, self.keys))
        return (
            self.query.device,
            self.dtype(),
            self.query.shape[1],
            *sizes,
            None if queue is None else (queue.dtype, len(queue)),
            self.ignore is None,
        )

    def sources(self) -> list[Tensor]:
        """The keys of the batch and, if there are any, those of the queue."""
        has_queue = self.queue is not None and len(self.queue) > 0
        return [self.keys, self.queue.contiguous()] if has_queue else [self.keys]  # type: ignore[union-attr]

    def arguments(self, source: Tensor) -> tuple[Any, ...]:
        """The arguments with which every kernel that computes logits begins."""
        offset = 0 if source is self.keys else len(self.keys)
        ignore = None if self.ignore is None else aligned(self.ignore[:, offset : offset + len(source)])
        return (
            self.query,
            self.momentum,
            source,
            self.temperature,
            self.positive.contiguous(),
            ignore,
            len(self.query),
            len(source),
            offset,
            0 if ignore is None else ignore.stride(0),
            self.query.shape[1],
        )


def aligned(ignore: Tensor) -> Tensor:
    """Bytes of a bool matrix whose rows are whole vectors of 16: padded where they are not."""
    ignore = ignore.view(torch.uint8)
    sizes = (ignore.data_ptr(), ignore.stride(0), ignore.shape[1])
    if ignore.stride(1) == 1 and all(size % 16 == 0 for size in sizes):
        return ignore
    return torch.nn.functional.pad(ignore, (0, -ignore.shape[1] % 16)).contiguous()


@triton.jit
def load(base, row, count, first, width, BLOCK_WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """[rows, BLOCK_WIDTH] of a contiguous matrix from column `first` on; 0 outside."""
    place = first + tl.arange(0, BLOCK_WIDTH)
    inside = (row[:, None] < count) & (place[None, :] < width)
    return tl.load(base + row[:, None].to(tl.int64) * width + place[None, :], mask=inside, other=0.0)


@triton.jit
def logits(  # type: ignore[no-untyped-def]
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
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """Logits of student and teacher for some rows and some keys of `source`, each key read once, MASKED where a key
    does not count; and where the own key is.
    """
    student = tl.zeros((row.shape[0], key.shape[0]), dtype=tl.float32)
    teacher = tl.zeros((row.shape[0], key.shape[0]), dtype=tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        q = load(query, row, rows, first, width, BLOCK_WIDTH)
        m = load(momentum, row, rows, first, width, BLOCK_WIDTH)
        k = tl.trans(load(source, key, count, first, width, BLOCK_WIDTH).to(q.dtype))
        student = tl.dot(q, k, student, input_precision=PRECISION)
        teacher = tl.dot(m, k, teacher, input_precision=PRECISION)
    scale = 1 / tl.load(temperature)
    own_key = tl.load(positive + row, mask=row < rows, other=-1).to(tl.int32) - offset
    own = key[None, :] == own_key[:, None]
    counts = (key < count)[None, :]
    if ignore is not None:
        # Whole vectors of 16: one address each, where a byte at a time would take all registers.
        inside = (row < rows)[:, None] & (key < tl.cdiv(count, 16) * 16)[None, :]
        ignored = tl.load(
            ignore + row[:, None].to(tl.int64) * ignore_stride + key[None, :], mask=inside, other=0
        )
        counts &= own | (ignored == 0)
    return tl.where(counts, student * scale, MASKED), tl.where(counts, teacher * scale, MASKED), own


@triton.jit
def gradient_of_logits(x, y, own, statistics, row, rows, alpha):  # type: ignore[no-untyped-def]
    """p_student - alpha p_teacher - (1 - alpha) own: the loss gradient of the student's logits, times b."""
    student = tl.load(statistics + row, mask=row < rows, other=0.0)[:, None]
    teacher = tl.load(statistics + rows + row, mask=row < rows, other=0.0)[:, None]
    return tl.exp(x - student) - alpha * tl.exp(y - teacher) - tl.where(own, 1 - alpha, 0.0)


def variant(kernel: Any, dtype: str, source: str, best: Configuration) -> Variant:
    """A kernel for queries and keys of two Triton types; with `ignore`, which takes more than without."""
    names = TYPES | {"query": f"*{dtype}", "momentum": f"*{dtype}", "source": f"*{source}"}
    constants = best.constants(dtype)
    parts = (dtype, f"keys {source}", f"{best.rows}x{best.keys}x{best.width}", best.warps, best.stages)
    return Variant(
        name=f"contrastive_{kernel.__name__.removesuffix('_kernel')}[{','.join(map(str, parts))}]",
        kernel=kernel,
        signature={name: names[name] for name in kernel.arg_names if name not in constants},
        constants=constants,
        options=best.options(),
        tensor_cores=True,
    )


def key_types(dtype: str) -> tuple[str, ...]:
    """Triton types of the keys beside queries of one: the queries' own first."""
    return dtype, *(other for other in DTYPES if other != dtype)
