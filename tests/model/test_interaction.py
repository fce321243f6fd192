"""Half-precision tokens of the interaction: one rounding before they are sent, and float32 everywhere after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from atomas.config import LossConfig, ModelConfig
from atomas.distributed.partition import Partition
from atomas.model.alignment import HierarchicalAlignment, Level, interaction
from atomas.model.global_batch import GlobalBatch, Identities
from atomas.model.interaction import as_leaves, join_rows, score, split_rows
from atomas.phases import Collective, Observer, observed_by
from tests.ranks import run_ranks

WIDTH = 64
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Largest relative error of one rounding."""
HALVES = [torch.bfloat16, torch.float16]
PAIRS, SHARES = 7, {1: [7], 2: [4, 3], 4: [2, 2, 2, 1]}
LEVELS = 3


def _level(lengths: list[int], seed: int, dtype: torch.dtype = torch.float32) -> Level:
    """Tokens with a common direction, as those of an encoder have, and weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(sum(lengths), WIDTH, generator=generator)
    tokens += torch.randn(WIDTH, generator=torch.Generator().manual_seed(99))
    parts = torch.rand(sum(lengths), generator=generator).split(lengths)
    weight = torch.cat([part / part.sum() for part in parts])
    return Level(tokens.to(dtype), torch.tensor(lengths), weight, None)


def _lengths(seed: int, longest: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, longest, (PAIRS,), generator=generator).tolist()


@pytest.mark.parametrize("dtype", HALVES)
def test_scores_are_off_by_what_rounding_turns_the_tokens(dtype: torch.dtype) -> None:
    """Each entry of a token x moves by at most u |x_i|, so x by at most u |x|, which turns it by an angle of at most
    asin(u): its unit vector moves by 2 sin(asin(u) / 2) = u (1 + O(u^2)). A cosine of two moves by at most twice that,
    a maximum by no more than what it is taken of, and a mean with weights that sum to 1 neither.
    """
    unit = UNIT[dtype]
    text, smiles = _level(_lengths(1, 40), 1), _level(_lengths(2, 30), 2)
    exact = interaction(text, smiles)
    rounded = interaction(*(level._replace(tokens=level.tokens.to(dtype)) for level in (text, smiles)))
    assert rounded.dtype == torch.float32
    worst = (rounded - exact).abs().max()
    assert 0 < worst <= 2 * unit * (1 + unit)
    # The errors of many entries and tokens are not all of one sign: a rounded sum or score would be worse than this.
    assert worst < unit / 10


@pytest.mark.parametrize("dtype", HALVES)
def test_what_follows_the_rounding_is_float32(dtype: torch.dtype) -> None:
    """Scores and gradients are those of float32 tokens with the same values, to float32's rounding."""
    text, smiles = _level(_lengths(1, 40), 1, dtype), _level(_lengths(2, 30), 2, dtype)
    found = []
    for tokens in (dtype, torch.float32):
        leaves = [as_leaves(level.tokens.to(tokens), level.weighted[1]) for level in (text, smiles)]
        scores = score(*leaves, text.lengths, smiles.lengths)
        upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3))
        found.append([scores, *torch.autograd.grad((scores * upstream).sum(), [*leaves[0], *leaves[1]])])
    for half, single in zip(*found, strict=True):
        assert half.dtype == torch.float32
        assert_close(half, single, rtol=1e-5, atol=1e-6 * float(single.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "width"), [(0, 6), (1, 6), (1, 7), (5, 7)])
def test_rows_hold_tokens_and_weights_bit_by_bit(dtype: torch.dtype, count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(count, width, generator=generator).to(dtype)
    weight = torch.rand(count, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    weight[:1] = torch.nan
    rows = join_rows(tokens, weight)
    assert rows.dtype == dtype
    assert rows.nbytes == tokens.nbytes + weight.nbytes
    for got, expected in zip(split_rows(rows), (tokens, weight), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got.clone().view(torch.uint8), expected.clone().view(torch.uint8))


@pytest.mark.parametrize("how", ["weights", "autocast", "float32"])
def test_tokens_have_the_precision_of_the_run_and_nothing_else_has(how: str) -> None:
    torch.manual_seed(0)
    model = ModelConfig(d_model=WIDTH, polymerization_heads=4)
    hierarchy = HierarchicalAlignment(WIDTH, model, LossConfig()).text
    lengths = torch.tensor([20, 31, 8])
    states = torch.randn(int(lengths.sum()), WIDTH)
    if how == "weights":
        hierarchy, states = hierarchy.to(torch.bfloat16), states.bfloat16()
    entered: list[Tensor] = []
    hierarchy.polymerizations[1].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        levels = hierarchy(states, lengths)
    expected = torch.float32 if how == "float32" else torch.bfloat16
    assert [level.tokens.dtype for level in levels] == [expected] * LEVELS
    assert [level.weighted[1].dtype for level in levels] == [torch.float32] * LEVELS
    # clusters of the next level are found from what was not rounded
    assert entered[0].dtype == torch.float32
    assert torch.equal(entered[0].to(expected), levels[1].tokens)
    assert torch.equal(entered[0], levels[1].tokens.float()) == (how == "float32")


class _Payloads(Observer):
    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def collective(self, call: Collective) -> None:
        name = f"{call.kind}: {call.what}"
        self.bytes[name] = self.bytes.get(name, 0) + call.payload_bytes


def _everyone(sizes: list[int]) -> GlobalBatch:
    numbers = torch.arange(sum(sizes))
    return GlobalBatch(
        partition=Partition(tuple(sizes)),
        identities=Identities(text=numbers, molecule=numbers),
        sample_id=numbers,
        text_tokens=0,
        smiles_tokens=0,
    )


def _loss(exchange: Any, rank: int, world: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, int]]:
    """Loss of the global batch, gradients of this rank's tokens and weights, and the bytes that it hands over.

    Gradients of half-precision leaves are taken as they come, before autograd would round them.
    """
    start = sum(SHARES[world][:rank])
    own = slice(start, start + SHARES[world][rank])
    torch.manual_seed(0)
    model = ModelConfig(d_model=WIDTH, polymerization_heads=4)
    alignment = HierarchicalAlignment(WIDTH, model, LossConfig(exchange=exchange))
    sides, leaves = [], []
    for seed, longest in ((0, 40), (1, 30)):
        levels = []
        for number in range(LEVELS):
            lengths = _lengths(seed, longest // (1 + number))
            whole = _level(lengths, 10 * seed + number, dtype)
            first, count = sum(lengths[: own.start]), sum(lengths[own])
            tokens, weight = as_leaves(*(part[first : first + count] for part in whole.weighted))
            levels.append(Level(tokens, torch.tensor(lengths[own]), weight, None))
            leaves += [tokens, weight]
        sides.append(levels)
    seen = _Payloads()
    with observed_by(seen):
        loss = alignment(*sides, _everyone(SHARES[world]))["loss/hierarchical"]
        gradients = torch.autograd.grad(loss, leaves)
    return [loss.detach(), *(gradient / world for gradient in gradients)], seen.bytes


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    found = {}
    for exchange in ("allgather", "ring"):
        for dtype in (torch.bfloat16, torch.float32):
            values, sent = _loss(exchange, rank, world, dtype)
            dist.all_reduce(values[0])
            found[exchange, dtype] = [values[0] / world, *values[1:]], sent
    torch.save(found, f"{folder}/world{world}_{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_has_the_same_loss_and_gradient(world: int, tmp_path: Path) -> None:
    run_ranks(_worker, world, world, str(tmp_path))
    by_rank = [torch.load(tmp_path / f"world{world}_{rank}.pt") for rank in range(world)]
    for exchange in ("allgather", "ring"):
        for dtype in (torch.bfloat16, torch.float32):
            expected, _ = _loss(exchange, 0, 1, dtype)
            found = [values[exchange, dtype][0] for values in by_rank]
            for loss, *_ in found:
                assert_close(loss, expected[0], rtol=1e-6, atol=0)
            for gradients in zip(*found, expected, strict=True):
                *parts, whole = gradients
                if whole.ndim:
                    assert whole.dtype == torch.float32
                    joined = torch.cat(parts)
                    # those of weights are differences
                    assert_close(joined, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_tokens_take_half_the_bytes_and_gradients_as_many(tmp_path: Path) -> None:
    run_ranks(_worker, 2, 2, str(tmp_path))
    found = torch.load(tmp_path / "world2_0.pt")
    for exchange in ("allgather", "ring"):
        half, single = (found[exchange, dtype][1] for dtype in (torch.bfloat16, torch.float32))
        assert half.keys() == single.keys()
        tokens = [name for name in single if "tokens of level" in name and "gradient" not in name]
        assert len(tokens) == LEVELS
        for name in single:
            share = (2 * WIDTH + 4) / (4 * WIDTH + 4) if name in tokens else 1
            assert half[name] == share * single[name], name
