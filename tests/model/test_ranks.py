"""Several ranks against one: the same losses, and the same gradient after averaging, to rounding."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from atomas.config import LossConfig, ModelConfig, MomentumConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.model import gradient_cache
from atomas.model.alignment import Level
from atomas.model.atomas import AtomasModel
from atomas.model.momentum_encoder import Momentum
from atomas.model.row_store import StorePlace
from atomas.training.step import contrastive_step
from tests.ranks import run_ranks

STEPS = 2
PAIRS = 11
SHARES = {1: [11], 2: [6, 5], 4: [3, 3, 3, 2]}
"""Pairs of each rank: the last one has fewer."""
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-4, "atol": 1e-4},  # of tokens: losses, see `_near` for gradients
}


@dataclass(frozen=True)
class Case:
    """What is trained, which fixes the result; and how, which must not matter."""

    momentum: bool = True
    false_negatives: Any = "mask"
    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    dtype: torch.dtype = torch.float64
    tokens: torch.dtype | None = None
    """of the interaction; None: `dtype`"""
    exchange: Any = "allgather"
    micro_batches: int = 1
    cache: StorePlace = "device"
    tile_pairs: int = 256

    @property
    def problem(self) -> "Case":
        """The same in one pass of one rank."""
        return Case(self.momentum, self.false_negatives, self.level_weights, self.dtype, self.tokens)


WHAT: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": False, "level_weights": (0.0, 2.0, 0.0)},
    {"false_negatives": "multi_positive"},
    {"false_negatives": "keep", "momentum": False},
    {"dtype": torch.float32},
    {"dtype": torch.float32, "tokens": torch.bfloat16},
)
HOW: tuple[dict[str, Any], ...] = (
    {},
    {"exchange": "ring"},
    {"micro_batches": 2},
    {"exchange": "ring", "micro_batches": 2, "cache": "disk", "tile_pairs": 1},
)
# Every way to compute the first problem, then the two that share least code for the others; tests of the interaction
# hold the last one to more in a single pass.
CASES = [Case(**what, **how) for what in WHAT[:-1] for how in (HOW if what is WHAT[0] else HOW[::3])]
CASES += [Case(**WHAT[-1], **how) for how in HOW[2:]]


class PlainEngine:
    """What `contrastive_step` needs of DeepSpeed's engine, without DeepSpeed."""

    def __init__(self, module: AtomasModel, accumulation: int) -> None:
        self.module = module
        self._accumulation = accumulation

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        """The forward pass."""
        result: dict[str, Tensor] = self.module(*arguments)
        return result

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch."""
        (loss / self._accumulation).backward()

    def step(self) -> None:
        """Nothing between micro-batches."""


def _model(case: Case, **weights: float) -> AtomasModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1}
    loss = LossConfig(
        task="both",
        level_weights=case.level_weights,
        false_negatives=case.false_negatives,
        exchange=case.exchange,
        **weights,  # type: ignore[arg-type]
    )
    model = AtomasModel(
        ModelConfig(**sizes, num_heads=4, pooling="attention", dropout_rate=0.0),
        loss,
        vocab_size=40,
        token_budget=40,
        max_text_tokens=32,
        max_smiles_tokens=32,
    )
    if case.tokens is not None and model.alignment is not None:
        # heads in half precision would round by the shape of a micro-batch
        for hierarchy in (model.alignment.text, model.alignment.smiles):
            hierarchy.register_forward_hook(partial(_round, case.tokens))
    return model.to(case.dtype).eval()


def _round(dtype: torch.dtype, module: Any, inputs: Any, levels: list[Level]) -> list[Level]:
    return [level._replace(tokens=level.tokens.to(dtype)) for level in levels]


def _tokens(count: int, longest: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [[*torch.randint(3, 40, (n - 1,), generator=generator).tolist(), 1] for n in lengths]


def _batch(step: int, part: slice) -> PairBatch:
    """Some of the pairs of a step. Some molecules, and over the steps some texts, are the same."""
    numbers = torch.arange(PAIRS) + PAIRS * step
    return PairBatch(
        text=RaggedTokens.from_lists(_tokens(PAIRS, 22, seed=2 * step)[part]),
        smiles=RaggedTokens.from_lists(_tokens(PAIRS, 13, seed=2 * step + 1)[part]),
        molecule_id=torch.tensor([0, 1, 2, 3, 1, 5, 6, 1, 8, 9, 0])[part] + PAIRS * step,
        text_id=torch.where(numbers % PAIRS == 4, 4, numbers)[part],
        sample_id=numbers[part],
    )


def _steps(part: slice, case: Case) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Losses and gradients of every step, with plain descent between steps."""
    model = _model(case)
    engine = PlainEngine(model, case.micro_batches)
    gradient_cache.TILE_PAIRS = case.tile_pairs
    slow = None
    if case.momentum:
        # smaller than a batch: the second step reads a queue that has wrapped
        slow = Momentum(model.encoder, MomentumConfig(queue_size=8)).to(case.dtype)
    for step in range(STEPS):
        if slow is not None:
            _follow(slow, model)
        model.zero_grad()
        losses = contrastive_step(
            engine, slow, _batch(step, part), micro_batches=case.micro_batches, cache=case.cache
        )
        gradients = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            gradients[name] = parameter.grad.clone()
            parameter.data -= 0.01 * parameter.grad
        yield losses, gradients


@torch.no_grad()
def _follow(slow: Momentum, model: AtomasModel) -> None:
    """`Momentum.update`, which has float32 masters, in any dtype."""
    for own, source in zip(slow.encoder.parameters(), model.encoder.parameters(), strict=True):
        own.lerp_(source, 1 - slow.coefficient)


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    start = sum(SHARES[world][:rank])
    part = slice(start, start + SHARES[world][rank])
    found = []
    for case in CASES:
        steps = []
        for losses, gradients in _steps(part, case):
            for value in losses.values():
                dist.all_reduce(value)
                value /= world
            steps.append((losses, gradients))
        found.append(steps)
    if rank == 0:
        torch.save(found, f"{folder}/world{world}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def expected() -> dict[Case, list[tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    """One rank, one pass."""
    return {problem: list(_steps(slice(0, PAIRS), problem)) for problem in {case.problem for case in CASES}}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_micro_batches_are_one(world: int, tmp_path: Path, expected: Any) -> None:
    if world == 1:
        found = [list(_steps(slice(0, PAIRS), case)) for case in CASES]
    else:
        run_ranks(_worker, world, world, str(tmp_path))
        found = torch.load(tmp_path / f"world{world}.pt")
    for case, steps in zip(CASES, found, strict=True):
        # A rounding that falls to the other side in one step leads the weights of the next apart.
        compared = STEPS if case.tokens is None else 1
        for step, (ours, theirs) in enumerate(zip(steps[:compared], expected[case.problem])):  # noqa: B905
            for kind, values, references in zip(("loss", "gradient"), ours, theirs, strict=True):
                assert values.keys() == references.keys()
                for name, reference in references.items():
                    where = f"{case}, step {step}, {kind} {name}"
                    if case.tokens and kind == "gradient":
                        assert _near(values[name], reference), where
                        continue
                    assert_close(
                        values[name],
                        reference,
                        **TOLERANCE[case.tokens or case.dtype],
                        msg=lambda text, where=where: f"{where}: {text}",
                    )


def _near(gradient: Tensor, reference: Tensor) -> bool:
    """As a whole within one rounding to bf16: a token that lies between two roundings may fall to either side."""
    return bool((gradient - reference).norm() <= 2**-8 * reference.norm() + 1e-4)


def test_the_gradients_are_not_all_small(expected: Any) -> None:
    """Or the tolerance above would say nothing."""
    for problem, steps in expected.items():
        _, gradients = steps[0]
        for name, gradient in gradients.items():
            # a softmax does not see a shift
            if not name.endswith((".2.bias", "score.bias", "key_value.bias")):
                assert gradient.abs().max() > 1e-3, (problem, name)
