"""Forward kernels of the token interaction: a product with a two-sided maximum, then the sums.

`similarity_kernel` is a matrix product of all text with all SMILES tokens. What leaves a tile is, for every row, the
largest entry of each group of 16 columns, and for every column that of each group of 16 rows, each with its place in
one 32-bit integer: similarity in units of 2^-26, then 4 bits that prefer the lower place. So one integer maximum
compares value and place, and half a byte per similarity is written. `match_kernel` takes the maxima over the groups
of a sequence (of any length) and sums them with the importance weights.

No number depends on where in the batch a pair lies: scores are the same bits in any batch.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomas_kernels.triton.packing import GROUP, Packed
from atomas_kernels.triton.tuning import choose
from atomas_kernels.triton.variants import DTYPES, Variant, architecture, launch_options

_UNIT = tl.constexpr(2.0**26)
_ABSENT = tl.constexpr(-(2**31))
_BAND = tl.constexpr(8)
_MATCH = {"BLOCK_TOKENS": 64, "BLOCK_SEQUENCES": 8}


class Configuration(NamedTuple):
    """Rows and columns of a tile of the result, width of one step of the product, warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def constants(self, dtype: str) -> dict[str, Any]:
        """Compile-time constants for tokens of Triton type `dtype`."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        }

    def options(self) -> dict[str, Any]:
        """Launch options."""
        return launch_options(self.warps, self.stages)


def candidates(architecture: int, dtype: str) -> list[Configuration]:
    """Configurations for a compute capability and a token type, the static choice first."""
    if dtype == "fp32":
        return [Configuration(64, 64, 32, 4, 2)]
    if architecture == 80:
        return [Configuration(128, 128, 32, 8, 4)]
    if architecture == 100:
        return [Configuration(128, 128, 64, 8, 3)]
    # Four warps and 96 KiB: two programs share a multiprocessor, and one multiplies while the other compares.
    return [Configuration(128, 128, 64, 4, 3), Configuration(128, 256, 64, 8, 4)]


class Matches(NamedTuple):
    """The best token of every sequence of the other side for every own token, [other sequences, own rows]; of no
    meaning behind the last sequence and where a side is empty.
    """

    value: Tensor
    """float32: similarity."""
    place: Tensor
    """int16: position in its sequence; -1 in rows without a token."""


def new_matches(own_rows: int, other_sequences: int, device: torch.device) -> Matches:
    """Matches to be written; zero where nothing will be."""
    shape = (other_sequences, own_rows)
    return Matches(torch.zeros(shape, device=device), torch.zeros(shape, dtype=torch.int16, device=device))


def similarity_keys(text: Packed, smiles: Packed) -> tuple[Tensor, Tensor]:
    """Largest keys of each text row over groups of SMILES rows [groups, rows] int32, and the reverse."""
    device, dtype = text.tokens.device, triton_dtype(text.tokens)
    text_keys = torch.empty(smiles.group_count, text.rows, dtype=torch.int32, device=device)
    smiles_keys = torch.empty(text.group_count, smiles.rows, dtype=torch.int32, device=device)

    def run(best: Configuration) -> None:
        tiles = text.rows // best.rows * (smiles.rows // best.columns)
        similarity_kernel[(tiles,)](
            text.tokens, smiles.tokens, text.scale, smiles.scale, text.groups, smiles.groups, text_keys, smiles_keys,
            text.group_count, smiles.group_count, text.width, **best.constants(dtype), **best.options(),
        )  # fmt: skip

    key = ("token_interaction", device, dtype, text.width, text.rows.bit_length(), smiles.rows.bit_length())
    run(choose(key, candidates(architecture(device), dtype), run))
    return text_keys, smiles_keys


def match(keys: Tensor, own: Packed, other: Packed, scores: Tensor, matches: Matches | None) -> None:
    """Maxima over whole sequences: half their weighted sums to `scores` [own, other] float32, any strides, and the
    matches where wanted.
    """
    grid = (own.count, triton.cdiv(other.count, _MATCH["BLOCK_SEQUENCES"]))
    kept = (None, None, 0) if matches is None else (*matches, matches.place.stride(0))
    match_kernel[grid](
        keys, own.weight, own.scale, own.sequences, other.sequences, scores, *kept,
        own.count, other.count, own.rows, *scores.stride(), **_MATCH, **launch_options(4, 1),
    )  # fmt: skip


def triton_dtype(tokens: Tensor) -> str:
    """Triton's name of a dtype."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[tokens.dtype]


@triton.jit
def similarity_kernel(  # type: ignore[no-untyped-def]
    text,
    smiles,
    text_scale,
    smiles_scale,
    text_groups,
    smiles_groups,
    text_keys,
    smiles_keys,
    text_group_count,
    smiles_group_count,
    width,
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    PRECISION: tl.constexpr,  # noqa: N803
):
    """One tile of similarities, reduced in both directions."""
    # Eight rows of tiles at a time, column by column: programs that run together share their tokens in the cache.
    row_tiles = text_group_count // (ROWS // GROUP)
    column_tiles = smiles_group_count // (COLUMNS // GROUP)
    band = tl.program_id(0) // (_BAND * column_tiles)
    height = tl.minimum(row_tiles - band * _BAND, _BAND)
    within = tl.program_id(0) % (_BAND * column_tiles)
    tile_row = band * _BAND + within % height
    tile_column = within // height

    row_group = tile_row * (ROWS // GROUP)
    column_group = tile_column * (COLUMNS // GROUP)
    text_size = text_groups + 3 * text_group_count + row_group
    smiles_size = smiles_groups + 3 * smiles_group_count + column_group
    if tl.load(text_size) * tl.load(smiles_size) > 0:
        row, column, step = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
        text += (tile_row * ROWS).to(tl.int64) * width
        smiles += (tile_column * COLUMNS).to(tl.int64) * width
        similarity = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, width, DEPTH):
            t = tl.load(text + row[:, None] * width + (first + step)[None, :])
            s = tl.load(smiles + column[None, :] * width + (first + step)[:, None])
            similarity = tl.dot(t, s, similarity, input_precision=PRECISION)

        row_scale = tl.load(text_scale + tile_row * ROWS + row) * _UNIT
        column_scale = tl.load(smiles_scale + tile_column * COLUMNS + column)
        # A similarity that is NaN becomes 0 here; the pair's score is made NaN by `match_kernel`.
        fixed = (similarity * row_scale[:, None] * column_scale[None, :]).to(tl.int32) << 4
        # Padding has similarity 0, so that the sum with this is the lowest integer.
        row_tail = _tail(row, tl.load(text_size + row // GROUP))
        column_tail = _tail(column, tl.load(smiles_size + column // GROUP))

        group = tl.arange(0, COLUMNS // GROUP)
        best = tl.max(tl.reshape(fixed + column_tail[None, :], (ROWS, COLUMNS // GROUP, GROUP)), axis=2)
        line = (column_group + group).to(tl.int64) * (text_group_count * GROUP)
        tl.store(text_keys + line[None, :] + (tile_row * ROWS + row)[:, None], best)

        group = tl.arange(0, ROWS // GROUP)
        best = tl.max(tl.reshape(fixed + row_tail[:, None], (ROWS // GROUP, GROUP, COLUMNS)), axis=1)
        line = (row_group + group).to(tl.int64) * (smiles_group_count * GROUP)
        tl.store(smiles_keys + line[:, None] + (tile_column * COLUMNS + column)[None, :], best)


@triton.jit
def _tail(place, size):  # type: ignore[no-untyped-def]
    """The lowest four bits of a key: larger for a lower place in the group."""
    place = place % GROUP
    return tl.where(place < size, GROUP - 1 - place, _ABSENT)


@triton.jit(do_not_specialize=["own_count", "other_count", "own_stride", "other_stride"])
def match_kernel(  # type: ignore[no-untyped-def]
    keys,
    weight,
    scale,
    own_sequences,
    other_sequences,
    scores,
    value,
    place,
    match_stride,
    own_count,
    other_count,
    rows,
    own_stride,
    other_stride,
    BLOCK_TOKENS: tl.constexpr,  # noqa: N803
    BLOCK_SEQUENCES: tl.constexpr,  # noqa: N803
):
    """One own sequence with some sequences of the other side."""
    own = tl.program_id(0)
    other = tl.program_id(1) * BLOCK_SEQUENCES + tl.arange(0, BLOCK_SEQUENCES)
    exists = other < other_count
    first_row = tl.load(own_sequences + own) * GROUP
    length = tl.load(own_sequences + 2 * own_count + own)
    first_group = tl.load(other_sequences + other, mask=exists, other=0)
    groups = tl.load(other_sequences + 2 * other_count + other, mask=exists, other=0)
    groups = (groups + GROUP - 1) // GROUP

    total = tl.zeros((BLOCK_SEQUENCES,), dtype=tl.float32)
    for start in range(0, length, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        row = first_row + token
        present = token < length
        best = tl.full((BLOCK_SEQUENCES, BLOCK_TOKENS), _ABSENT, dtype=tl.int32)
        best_group = tl.zeros((BLOCK_SEQUENCES, BLOCK_TOKENS), dtype=tl.int32)
        for group in range(tl.max(groups)):
            line = (first_group + group).to(tl.int64)[:, None] * rows
            inside = (group < groups)[:, None] & present[None, :]
            key = tl.load(keys + line + row[None, :], mask=inside, other=_ABSENT)
            # Of equal similarities the earlier group keeps its place.
            better = (key >> 4) > (best >> 4)
            best_group = tl.where(better, group, best_group)
            best = tl.where(better, key, best)
        largest = (best >> 4).to(tl.float32) / _UNIT
        w = tl.load(weight + row, mask=present, other=0.0)
        # NaN from a token that is not finite.
        w += 0.0 * tl.load(scale + row, mask=present, other=0.0)
        total += tl.sum(largest * w[None, :], axis=1)
        if value is not None:
            padded = token < (length + GROUP - 1) // GROUP * GROUP
            inside = (groups > 0)[:, None] & padded[None, :]
            to = other.to(tl.int64)[:, None] * match_stride + row[None, :]
            tl.store(value + to, largest, mask=inside)
            position = best_group * GROUP + GROUP - 1 - (best & (GROUP - 1))
            tl.store(place + to, tl.where(present[None, :], position, -1).to(tl.int16), mask=inside)
    to = scores + own.to(tl.int64) * own_stride + other.to(tl.int64) * other_stride
    tl.store(to, tl.where(groups > 0, total * 0.5, 0.0), mask=exists)


def variants(architecture: int) -> Iterator[Variant]:
    """See `variants.py`."""
    for dtype in DTYPES:
        for c in candidates(architecture, dtype):
            tokens = {
                "text": f"*{dtype}",
                "smiles": f"*{dtype}",
                "text_scale": "*fp32",
                "smiles_scale": "*fp32",
            }
            groups = {
                "text_groups": "*i32",
                "smiles_groups": "*i32",
                "text_keys": "*i32",
                "smiles_keys": "*i32",
            }
            sizes = {"text_group_count": "i32:16", "smiles_group_count": "i32:16", "width": "i32:16"}
            yield Variant(
                name=f"token_interaction_similarity[{dtype},{c.rows}x{c.columns}x{c.depth}]",
                kernel=similarity_kernel,
                signature=tokens | groups | sizes,
                constants=c.constants(dtype),
                options=c.options(),
                tensor_cores=True,
            )
    pointers = {"keys": "*i32", "weight": "*fp32", "scale": "*fp32", "own_sequences": "*i32"}
    pointers |= {"other_sequences": "*i32", "scores": "*fp32", "match_stride": "i32:16"}
    sizes = {
        "own_count": "i32",
        "other_count": "i32",
        "rows": "i32:16",
        "own_stride": "i32",
        "other_stride": "i32",
    }
    for name, signature, constants in (
        ("matches", {"value": "*fp32", "place": "*i16"}, {}),
        ("scores", {}, {"value": None, "place": None}),
    ):
        yield Variant(
            name=f"token_interaction_match[{name}]",
            kernel=match_kernel,
            signature=pointers | sizes | signature,
            constants=_MATCH | constants,
            options=launch_options(4, 1),
            tensor_cores=False,
        )
