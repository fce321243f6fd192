"""The gradient that DeepSpeed's engine holds after one global batch, against that of one process."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from atomas.config import Config, DataConfig, DeepSpeedConfig, MomentumConfig, OptimizerConfig, TrainingConfig
from atomas.model.momentum_encoder import Momentum
from atomas.training.engine import build_engine
from atomas.training.step import contrastive_step
from tests.model.test_ranks import PAIRS, SHARES, TOLERANCE, Case, PlainEngine, _batch, _model
from tests.ranks import run_ranks

STAGES = (0, 1, 2, 3)
HOW: tuple[dict[str, Any], ...] = ({}, {"exchange": "ring", "micro_batches": 2, "cache": "host"})


def _gradients(part: slice, case: Case, stage: int | None) -> dict[str, Tensor]:
    """Losses and full gradients of one batch, with a queue from another one."""
    model = _model(case)
    # Under stage 3 all ranks make equally many passes: here one a sequence, and the last rank has fewer of these.
    model.encoder.backbone.token_budget = 1 if stage == 3 else 1000
    slow = Momentum(model.encoder, MomentumConfig(queue_size=16)).to(case.dtype)
    slow.enqueue(slow.targets(_batch(1, part)))
    if stage is None:
        engine: Any = PlainEngine(model, case.micro_batches)
    else:
        world = dist.get_world_size()
        pairs = case.micro_batches * world
        config = Config(
            data=DataConfig(batch_size=pairs),
            training=TrainingConfig(micro_batch_size=1),
            deepspeed=DeepSpeedConfig(zero_stage=stage),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(gradient_clipping=0.0),
        )
        engine = build_engine(config, model, world)
    losses = contrastive_step(
        engine, slow, _batch(0, part), micro_batches=case.micro_batches, cache=case.cache
    )
    if stage is None:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    else:
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
        for value in losses.values():
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return losses | {f"gradient of {name}": value for name, value in found.items()}


def _worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    start = sum(SHARES[world][:rank])
    part = slice(start, start + SHARES[world][rank])
    found = {
        (stage, number): _gradients(part, Case(dtype=torch.float32, **how), stage)
        for stage in STAGES
        for number, how in enumerate(HOW)
    }
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_zero_stage_has_the_gradient_of_one_process(world: int, tmp_path: Path) -> None:
    run_ranks(_worker, world, world, str(tmp_path))
    expected = _gradients(slice(0, PAIRS), Case(dtype=torch.float32), None)
    for (stage, number), found in torch.load(tmp_path / "found.pt").items():
        assert found.keys() == expected.keys()
        for name, reference in expected.items():
            where = f"ZeRO {stage}, {HOW[number]}, {name}"
            assert_close(
                found[name],
                reference,
                **TOLERANCE[torch.float32],
                msg=lambda text, where=where: f"{where}: {text}",
            )
