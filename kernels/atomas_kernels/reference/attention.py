"""T5 attention over packed sequences (Raffel et al. 2020, arXiv 1910.10683, section 2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import inf
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atomas_kernels import checks


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_lengths: Tensor,
    key_lengths: Tensor,
    *,
    distance_bias: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
    dropout: float,
) -> Tensor:
    """See `atomas_kernels.packed_attention`.

    Sequences of like lengths go through `scaled_dot_product_attention` together. On the CPU that means equal
    lengths, so nothing is padded.
    """
    layout = _layout(
        tuple(checks.segment_sizes("query_lengths", query_lengths, query.shape[0])),
        tuple(checks.segment_sizes("key_lengths", key_lengths, key.shape[0])),
        _waste(query.device),
        query.device,
    )
    bias = None if distance_bias is None else distance_bias.to(query.dtype)
    # `split` (not slicing) keeps the backward linear: the pieces' gradients are concatenated once.
    queries = query.index_select(0, layout.query_slots).split([g.rows * g.queries for g in layout.groups])
    key_slots = [g.rows * g.keys for g in layout.groups]
    keys, values = (x.index_select(0, layout.key_slots).split(key_slots) for x in (key, value))
    masks = layout.key_mask.split(key_slots)
    of_keys: Sequence[Tensor | None] = [None] * len(layout.groups)
    if key_bias is not None:
        of_keys = key_bias.to(query.dtype).index_select(0, layout.key_slots).split(key_slots)
    # Where nothing is attended the result is zero, but part of the graph as every other is.
    nothing = query[:0].sum(dim=0) + key[:0].sum(dim=0) + value[:0].sum(dim=0)
    if not layout.groups and bias is not None:
        nothing = nothing + bias[:, :0].sum(dim=1, keepdim=True)
    if not layout.groups and key_bias is not None:
        nothing = nothing + key_bias[:0].sum().to(query.dtype)
    outputs = [nothing[None]]
    parts = zip(layout.groups, queries, keys, values, of_keys, masks, strict=True)
    for group, q, k, v, of_key, mask in parts:
        addend = _by_distance(group, bias, causal, query)
        if layout.padded:
            of_key = (query.new_zeros(mask.shape) if of_key is None else of_key).masked_fill(~mask, -inf)
        if of_key is not None:
            of_key = of_key.view(group.rows, 1, 1, group.keys)
            addend = of_key if addend is None else addend + of_key
        q, k, v = (x.unflatten(0, (group.rows, -1)).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=addend, dropout_p=dropout, scale=1.0)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.output_slots)


def _by_distance(group: "_Group", bias: Tensor | None, causal: bool, like: Tensor) -> Tensor | None:
    """What is added to the logits [rows, H, queries, keys], broadcast; None for nothing.

    Queries stand in reverse order, so query slot i and key slot j are i + j - (queries - 1) apart, and the
    windows of one vector over all distances are the rows: a view, in which nothing is stored twice.
    """
    if bias is None and not causal:
        return None
    distance = torch.arange(1 - group.queries, group.keys, device=like.device)
    if bias is None:
        addend = like.new_zeros(1, distance.shape[0])
    else:
        reach = bias.shape[1] // 2
        addend = bias[:, distance.clamp(-reach, reach) + reach]
    if causal:
        addend = addend.masked_fill(distance > 0, -inf)
    return addend.unfold(1, group.keys, 1)[None]


def attention_slots(query_lengths: Tensor, key_lengths: Tensor, device: torch.device) -> int:
    """Slots of queries and keys that `packed_attention` computes on, where tokens stand and where none does."""
    groups = _groups(tuple(query_lengths.tolist()), tuple(key_lengths.tolist()), _waste(device))
    return sum(len(rows) * (queries + keys) for queries, keys, rows in groups)


def _waste(device: torch.device) -> float:
    """The largest share of a group's slots that may be empty.

    None on the CPU. On an accelerator some padding costs less than a launch for every length that occurs.
    """
    return 0.0 if device.type == "cpu" else 0.05


def _groups(
    query_sizes: tuple[int, ...], key_sizes: tuple[int, ...], waste: float
) -> list[tuple[int, int, list[int]]]:
    """Slots of queries and of keys, and the sequences that get so many each; those without either are left out."""
    rows = [row for row, sizes in enumerate(zip(query_sizes, key_sizes, strict=True)) if all(sizes)]
    return [
        (max(query_sizes[row] for row in part), key_sizes[part[0]], part)
        for alike in _alike(rows, query_sizes, waste)
        for part in _alike(alike, key_sizes, waste)
    ]


def _alike(rows: Sequence[int], sizes: Sequence[int], waste: float) -> list[list[int]]:
    """`rows` by falling size, a new group wherever the last one would be filled less than `waste` allows."""
    groups: list[list[int]] = []
    filled = 0
    for row in sorted(rows, key=lambda row: -sizes[row]):
        if groups:
            slots = sizes[groups[-1][0]] * (len(groups[-1]) + 1)
            if slots - filled - sizes[row] <= waste * slots:
                groups[-1].append(row)
                filled += sizes[row]
                continue
        groups.append([row])
        filled = sizes[row]
    return groups


class _Group(NamedTuple):
    """Sequences of like lengths."""

    rows: int
    queries: int
    """Slots of one row, with padding."""
    keys: int


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the tokens in the slots of all groups are taken from, group after group and row after row."""

    groups: list[_Group]
    padded: bool
    query_slots: Tensor
    """[slots] int64, token in each slot; the last token of a sequence comes first."""
    key_slots: Tensor
    """[slots] int64, token in each slot."""
    key_mask: Tensor
    """[slots] bool, False at padding."""
    output_slots: Tensor
    """[T_q] int64, 1 + the slot of every query token; 0 where there are no keys."""


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _layout(
    query_sizes: tuple[int, ...], key_sizes: tuple[int, ...], waste: float, device: torch.device
) -> _Layout:
    """The layout of these lengths with no more than `waste` empty; all layers of a model share it."""
    query_starts, key_starts = ([0, *accumulate(sizes)] for sizes in (query_sizes, key_sizes))
    groups = _groups(query_sizes, key_sizes, waste)

    none = torch.empty(0, dtype=torch.int64)
    query_slots, key_slots, key_mask = [none], [none], [none.bool()]
    output_slots = torch.zeros(query_starts[-1], dtype=torch.int64)
    filled = 1
    for queries, keys, rows in groups:
        backwards, forwards = torch.arange(queries - 1, -1, -1), torch.arange(keys)
        for row in rows:
            start, n, m = query_starts[row], query_sizes[row], key_sizes[row]
            query_slots.append(start + backwards.clamp(max=n - 1))
            key_slots.append(key_starts[row] + forwards.clamp(max=m - 1))
            key_mask.append(forwards < m)
            output_slots[start : start + n] = filled + backwards[:n]
            filled += queries
    return _Layout(
        groups=[_Group(len(rows), queries, keys) for queries, keys, rows in groups],
        padded=waste > 0,
        query_slots=torch.cat(query_slots).to(device),
        key_slots=torch.cat(key_slots).to(device),
        key_mask=torch.cat(key_mask).to(device),
        output_slots=output_slots.to(device),
    )
