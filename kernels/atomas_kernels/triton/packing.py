"""Ragged tokens laid out for tiles of a matrix product.

Every sequence is padded to groups of 16 rows, so that a tile of 64 to 256 rows holds whole groups of one sequence
each and a maximum over a group is a reduction of fixed shape. A mean sequence of 100 tokens pads by 7 %, one of 50
by 15 %; powers of two would pad by 33 % on average. All shapes follow from the shapes of the tokens and the
number of sequences, with room for the worst padding, so the host waits for nothing; tiles behind the last group
return at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomas_kernels.triton.variants import DTYPES, Variant, launch_options

GROUP = tl.constexpr(16)
"""Rows of a group."""
TILE = 256
"""Rows are a multiple of this: no tile is larger."""
SHORTEST = tl.constexpr(1e-12)
"""A token that is not as long as this counts as zero."""

ROW_BLOCK = {"ROWS": 64, "BLOCK_WIDTH": 128}
"""What one program takes where rows are worked on one by one."""

_DEPTH = 64
_BLOCK_SEQUENCES = 1024
_EXPONENT = tl.constexpr(0x7F800000)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Sequences in groups, on the device."""

    tokens: Tensor
    """[rows, width] in the tokens' dtype: each token times the power of two that brings its length into [1, 2),
    which is exact (but for halves that become subnormal) and keeps products in range; 0 where there is no token,
    none that is finite or none of length 1e-12. The width is a multiple of 64.
    """
    scale: Tensor
    """[rows] float32: what makes a unit vector of a row; NaN for a token that is not finite."""
    weight: Tensor
    """[rows] float32: importance, 0 where there is no token."""
    sequences: Tensor
    """[3, B] int32: first group, first token, length."""
    groups: Tensor
    """[4, G] int32: sequence, position of the first token in it, that token, tokens (at most 16; all 0 in the
    groups behind the last sequence).
    """

    @property
    def count(self) -> int:
        """Sequences."""
        return self.sequences.shape[1]

    @property
    def group_count(self) -> int:
        """Groups, with those behind the last sequence."""
        return self.groups.shape[1]

    @property
    def rows(self) -> int:
        """Rows of `tokens`."""
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """Columns of `tokens`."""
        return self.tokens.shape[1]


def packed_rows(tokens: int, sequences: int) -> int:
    """Rows for `tokens` tokens in `sequences` sequences of any lengths."""
    return triton.cdiv(tokens + (GROUP.value - 1) * sequences, TILE) * TILE


def pack(tokens: Tensor, weight: Tensor, lengths: Tensor) -> Packed:
    """Pack tokens [T, D] and weight [T] float32 of B > 0 sequences."""
    count, (total, width) = lengths.shape[0], tokens.shape
    rows = packed_rows(total, count)
    sequences = torch.empty(3, count, dtype=torch.int32, device=tokens.device)
    groups = torch.zeros(4, rows // GROUP.value, dtype=torch.int32, device=tokens.device)
    layout_kernel[(count,)](
        lengths.contiguous(), sequences, groups, count, rows // GROUP.value,
        BLOCK=_BLOCK_SEQUENCES, **launch_options(4, 1),
    )  # fmt: skip
    packed = Packed(
        tokens=tokens.new_empty(rows, triton.cdiv(width, _DEPTH) * _DEPTH),
        scale=torch.empty(rows, dtype=torch.float32, device=tokens.device),
        weight=torch.empty(rows, dtype=torch.float32, device=tokens.device),
        sequences=sequences,
        groups=groups,
    )
    pack_kernel[(rows // ROW_BLOCK["ROWS"],)](
        tokens, weight, groups, packed.tokens, packed.scale, packed.weight, packed.group_count, width, packed.width,
        **ROW_BLOCK, **launch_options(8, 1),
    )  # fmt: skip
    return packed


@triton.jit(do_not_specialize=["count"])
def layout_kernel(  # type: ignore[no-untyped-def]
    lengths,
    sequences,
    groups,
    count,
    group_count,
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One sequence's place and its groups."""
    sequence = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    first_group = 0
    first_token = 0
    for start in range(0, sequence, BLOCK):
        before = tl.load(lengths + start + place, mask=start + place < sequence, other=0).to(tl.int32)
        first_token += tl.sum(before)
        first_group += tl.sum((before + GROUP - 1) // GROUP)
    length = tl.load(lengths + sequence).to(tl.int32)
    tl.store(sequences + sequence, first_group)
    tl.store(sequences + count + sequence, first_token)
    tl.store(sequences + 2 * count + sequence, length)
    for start in range(0, (length + GROUP - 1) // GROUP, BLOCK):
        position = (start + place) * GROUP
        inside = position < length
        group = groups + first_group + start + place
        tl.store(group, sequence, mask=inside)
        tl.store(group + group_count, position, mask=inside)
        tl.store(group + 2 * group_count, first_token + position, mask=inside)
        tl.store(group + 3 * group_count, tl.minimum(length - position, GROUP), mask=inside)


@triton.jit
def token_of(groups, group_count, row):  # type: ignore[no-untyped-def]
    """The token in each row, int64, and whether there is one."""
    group = groups + row // GROUP
    present = row % GROUP < tl.load(group + 3 * group_count)
    return (tl.load(group + 2 * group_count) + row % GROUP).to(tl.int64), present


@triton.jit
def pack_kernel(  # type: ignore[no-untyped-def]
    tokens,
    weight,
    groups,
    packed,
    packed_scale,
    packed_weight,
    group_count,
    width,
    packed_width,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK_WIDTH: tl.constexpr,  # noqa: N803
):
    """Some rows: lengths of their tokens, then their copy. The second reading comes from the cache."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, present = token_of(groups, group_count, row)
    tl.store(packed_weight + row, tl.load(weight + token, mask=present, other=0.0))

    column = tl.arange(0, BLOCK_WIDTH)
    source = tokens + token[:, None] * width + column[None, :]
    square = tl.zeros((ROWS,), dtype=tl.float32)
    finite = tl.full((ROWS,), 1, dtype=tl.int32)
    for first in range(0, width, BLOCK_WIDTH):
        inside = present[:, None] & (first + column < width)[None, :]
        x = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
        finite = tl.minimum(finite, tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=1))
    norm = tl.sqrt_rn(square)
    # A finite token whose length overflows is zero, as x / inf is.
    usable = present & (norm >= SHORTEST) & (norm < float("inf"))
    norm = tl.where(usable, norm, 1.0)
    power = (norm.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
    unit = tl.where(usable, tl.div_rn(power, norm), 0.0)
    tl.store(packed_scale + row, tl.where(finite == 1, unit, float("nan")))

    target = packed + row.to(tl.int64)[:, None] * packed_width + column[None, :]
    for first in range(0, packed_width, BLOCK_WIDTH):
        inside = usable[:, None] & (first + column < width)[None, :]
        x = tl.load(source + first, mask=inside, other=0.0).to(tl.float32) / power[:, None]
        within = (first + column < packed_width)[None, :]
        tl.store(target + first, x.to(packed.dtype.element_ty), mask=within)


def variants(architecture: int) -> Iterator[Variant]:
    """See `variants.py`."""
    counts = {"count": "i32", "group_count": "i32:16"}
    yield Variant(
        name="token_interaction_layout",
        kernel=layout_kernel,
        signature={"lengths": "*i64", "sequences": "*i32", "groups": "*i32"} | counts,
        constants={"BLOCK": _BLOCK_SEQUENCES},
        options=launch_options(4, 1),
        tensor_cores=False,
    )
    for dtype in DTYPES:
        sources = {"tokens": f"*{dtype}", "weight": "*fp32", "groups": "*i32"}
        targets = {"packed": f"*{dtype}", "packed_scale": "*fp32", "packed_weight": "*fp32"}
        yield Variant(
            name=f"token_interaction_pack[{dtype}]",
            kernel=pack_kernel,
            signature=sources
            | targets
            | {"group_count": "i32:16", "width": "i32:16", "packed_width": "i32:16"},
            constants=dict(ROW_BLOCK),
            options=launch_options(8, 1),
            tensor_cores=False,
        )
