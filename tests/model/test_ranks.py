"""Two ranks against one: the same losses, and the same gradient after averaging."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.testing import assert_close

from atomas.config import LossConfig, ModelConfig, MomentumConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.model.atomas import AtomasModel
from atomas.model.momentum import Momentum

WORLD = 2
STEPS = 2
CASES = ((True, (1.0, 1.0, 1.0)), (False, (0.0, 2.0, 0.0)))
"""With momentum or without, and the weights of the levels."""
# T5's norm takes its variance in float32 even in float64.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def _model(level_weights: tuple[float, ...]) -> AtomasModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1}
    return (
        AtomasModel(
            ModelConfig(**sizes, num_heads=4, pooling="attention", dropout_rate=0.0),
            LossConfig(task="both", level_weights=level_weights),
            vocab_size=40,
            token_budget=40,
            max_text_tokens=32,
            max_smiles_tokens=32,
        )
        .double()
        .eval()
    )


def _tokens(lengths: list[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[*torch.randint(3, 40, (n - 1,), generator=generator).tolist(), 1] for n in lengths]


def _batch(step: int, part: slice) -> PairBatch:
    """Some of the B = 6 pairs of a step. Two molecules, and over the steps two texts, are the same."""
    numbers = torch.arange(6) + 6 * step
    return PairBatch(
        text=RaggedTokens.from_lists(_tokens([9, 3, 14, 5, 2, 21], seed=2 * step)[part]),
        smiles=RaggedTokens.from_lists(_tokens([4, 12, 7, 3, 8, 5], seed=2 * step + 1)[part]),
        molecule_id=torch.tensor([0, 1, 2, 3, 1, 5])[part] + 6 * step,
        text_id=torch.where(numbers % 6 == 4, 4, numbers)[part],
        sample_id=numbers[part],
    )


def _steps(
    part: slice, momentum: bool, level_weights: tuple[float, ...]
) -> Iterator[tuple[dict[str, Tensor], ...]]:
    """Losses and gradients of every step, with plain descent between steps."""
    model = _model(level_weights)
    slow = Momentum(model.encoder, MomentumConfig(queue_size=8)) if momentum else None
    for step in range(STEPS):
        if slow is not None:
            slow.update(dict(model.named_parameters()))
        batch = _batch(step, part)
        targets = None if slow is None else slow.targets(batch)
        losses = model(batch, targets)
        model.zero_grad()
        losses["loss"].backward()
        if slow is not None and targets is not None:
            slow.enqueue(batch, targets)
        gradients = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            if dist.is_initialized():
                dist.all_reduce(parameter.grad)
                parameter.grad /= WORLD
            gradients[name] = parameter.grad.clone()
            parameter.data -= 0.01 * parameter.grad
        yield {name: value.detach() for name, value in losses.items()}, gradients


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for number, case in enumerate(CASES):
        results = []
        for losses, gradients in _steps(slice(3 * rank, 3 * rank + 3), *case):
            for value in losses.values():
                dist.all_reduce(value)
                value /= WORLD
            results.append((losses, gradients))
        if rank == 0:
            torch.save(results, f"{folder}/case{number}.pt")
    dist.destroy_process_group()


def test_two_ranks_are_one(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=WORLD)
    for number, case in enumerate(CASES):
        ranks = torch.load(tmp_path / f"case{number}.pt")
        for found, expected in zip(ranks, _steps(slice(0, 6), *case), strict=True):
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.keys() == theirs.keys()
                for name, value in theirs.items():
                    assert_close(
                        ours[name], value, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
                    )
