"""A loss or gradient that is not finite on one rank: no rank steps, nothing is spoiled, and the next step is taken."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from atomas.config import Config, DeepSpeedConfig, StabilityConfig, TrainingConfig
from atomas.data.tokenizer import AtomasTokenizer
from atomas.model.momentum_encoder import Momentum
from atomas.training.data_position import BatchNumbers, DataPosition
from atomas.training.engine import OptimizerStep
from atomas.training.shards import OptimizerShard
from atomas.training.stability import RECENT, Stability, keep_batches
from atomas.training.step import contrastive_step
from tests.training.test_shards import WORLD, _batch, _config, _prepare, _start

CASES = [(precision, stage) for stage in range(4) for precision in ("fp32", "bf16", "bf16_autocast", "fp16")]
CASES.remove(("fp16", 0))  # refused
FEW = [("fp32", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)]


class _Faulty:
    """An engine whose loss, or its gradient, is not finite where asked for."""

    def __init__(self, engine, fault: str) -> None:  # type: ignore[no-untyped-def]
        self._engine, self._fault = engine, fault

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return getattr(self._engine, name)

    def __call__(self, *arguments):  # type: ignore[no-untyped-def]
        losses = self._engine(*arguments)
        if self._fault == "loss":
            losses["loss"] = losses["loss"] * math.inf
        elif self._fault == "gradient":
            losses["loss"].register_hook(lambda gradient: gradient * math.nan)
        return losses


def _everything(shard: OptimizerShard) -> dict[str, Tensor]:
    """Masters, moments and their steps."""
    held = {f"master/{name}": master.clone() for name, master in shard.masters.items()}
    for name in shard.masters:
        held[f"steps/{name}"] = torch.tensor(shard.steps(name))
        held |= {f"{key}/{name}": value.clone() for key, value in shard.moments(name).items()}
    return held


def _step(
    engine, momentum: Momentum, shard: OptimizerShard, config: Config, rank: int, number: int, fault=""
):  # type: ignore[no-untyped-def]
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=config.training.precision == "bf16_autocast")

    momentum.update(shard.masters_by_part())
    step = OptimizerStep(engine)
    for pass_ in range(config.training.gradient_accumulation_steps):
        bad = fault if rank == 1 and pass_ == 0 else ""
        batch = _batch(rank, 2 * number + pass_)
        contrastive_step(_Faulty(engine, bad), momentum, batch, autocast=autocast)
        step.take()
    return step


def _case(rank: int, precision: str, stage: int) -> None:
    base = _config(precision, stage, "replica")
    config = Config(
        data=base.data,
        model=base.model,
        loss=base.loss,
        momentum=base.momentum,
        training=TrainingConfig(precision=precision, gradient_accumulation_steps=2),  # type: ignore[arg-type]
        deepspeed=DeepSpeedConfig(
            zero_stage=stage,  # type: ignore[arg-type]
        ),
    )
    engine, shard, momentum = _start(config)
    if precision == "fp16":  # the first scale of all would overflow
        shard.set_scale({"cur_scale": 1024.0})
    assert not _step(engine, momentum, shard, config, rank, 0).left_out
    for number, fault in enumerate(("loss", "gradient"), 1):
        before = _everything(shard)
        step = _step(engine, momentum, shard, config, rank, number, fault)
        assert step.left_out, (precision, stage, fault, rank)
        assert not math.isfinite(step.norm)
        after = _everything(shard)
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), (precision, stage, fault, name)
    assert all(
        value.isfinite().all() for value in momentum.state_dict().values() if isinstance(value, Tensor)
    )
    before = _everything(shard)
    step = _step(engine, momentum, shard, config, rank, 3)
    assert not step.left_out
    assert math.isfinite(step.norm)
    after = _everything(shard)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def _worker(rank: int, folder: str, cases: Sequence[tuple[str, int]]) -> None:
    _prepare(rank, folder)
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda _: True  # a CPU can, slowly; DeepSpeed would refuse
    for precision, stage in cases:
        _case(rank, precision, stage)
    dist.destroy_process_group()


@pytest.mark.parametrize("cases", [FEW, pytest.param(CASES, marks=pytest.mark.slow)], ids=["few", "all"])
def test_no_rank_steps_alone(tmp_path: Path, cases: Sequence[tuple[str, int]]) -> None:
    mp.spawn(_worker, args=(str(tmp_path), cases), nprocs=WORLD)


def test_features_that_are_not_finite_stay_out_of_the_queue() -> None:
    from atomas.training.model_files import build_model

    config = _config("fp32", 0, "replica")
    momentum = Momentum(build_model(config, 40).encoder, config.momentum)
    momentum.enqueue(momentum.targets(_batch(0, 0)))
    targets = momentum.targets(_batch(0, 1))
    targets.keys.text[0, 3] = math.nan
    momentum.enqueue(targets)
    assert momentum.queue.filled == 3
    assert momentum.queue.text_id[:3].tolist() == [0, 1, 5]
    assert momentum.queue.keys().text.isfinite().all()


def test_too_many_steps_that_are_left_out_are_trouble() -> None:
    stability = Stability(StabilityConfig(skipped_limit=2))
    assert not stability.judge(1, math.nan, left_out=True).trouble
    assert not stability.judge(2, 1.0, left_out=False).remark
    assert not stability.judge(3, math.inf, left_out=True).trouble
    again = Stability(StabilityConfig(skipped_limit=2))
    again.set_state(stability.state())
    judgement = again.judge(4, math.nan, left_out=True)
    assert "step 4 is left out" in judgement.remark
    assert judgement.trouble.startswith(f"3 of the last {RECENT} steps")
    assert again.left_out == 3
    assert not stability.judge(3 + RECENT, math.nan, left_out=True).trouble  # the others are long ago


def test_spikes_are_judged_by_a_robust_score() -> None:
    stability = Stability(StabilityConfig(spike_window=8, spike_score=6, spike_steps=2, rollbacks=1))
    losses = [5.0, 5.1, 4.9, 5.0, 5.2, 4.8, 5.0]
    assert not any(
        stability.judge(1, loss, left_out=False).remark for loss in [*losses, 99.0]
    )  # not full before
    assert stability.score(5.3) < 6
    # median 5.0, median absolute deviation 0.1
    assert stability.score(6.4826) == pytest.approx(10, rel=1e-3)
    first = stability.judge(9, 6.5, left_out=False)
    assert "loss spike: 6.5 in step 9" in first.remark
    assert not first.trouble
    assert stability.in_doubt
    assert not stability.judge(10, 5.0, left_out=False).remark  # one that comes alone is forgotten
    assert not stability.in_doubt
    assert not stability.judge(11, 7.0, left_out=False).trouble
    assert "the last of 2 in a row" in stability.judge(12, 9.0, left_out=False).trouble


def test_spikes_are_only_logged_where_the_run_may_not_go_back() -> None:
    stability = Stability(StabilityConfig(spike_window=8, spike_steps=1))
    for loss in (5.0, 5.1, 4.9, 5.0, 5.2, 4.8, 5.0, 5.1):
        stability.judge(1, loss, left_out=False)
    judgement = stability.judge(9, 50.0, left_out=False)
    assert "loss spike" in judgement.remark
    assert not stability.in_doubt
    assert not judgement.trouble


def test_left_out_data_is_passed_over_from_wherever_one_comes() -> None:
    position = DataPosition()
    assert [position.of_step(step) for step in range(4)] == [0, 1, 2, 3]
    position = position.without(2, 5)  # back to step 2 after 5 steps
    assert position.left_out == [(2, 5)]
    assert [position.of_step(step) for step in range(5)] == [0, 1, 5, 6, 7]
    position = position.without(2, 4)  # and again: data 5 and 6
    assert position.left_out == [(2, 5), (5, 7)]
    assert [position.of_step(step) for step in range(5)] == [0, 1, 7, 8, 9]
    assert DataPosition([(5, 7), (2, 5), (4, 6)]).left_out == [(2, 7)]
    numbers = BatchNumbers(position, 1, 4, per_step=2)
    assert list(numbers) == [2, 3, 14, 15, 16, 17]
    assert numbers[1:3] == [3, 14]
    assert len(numbers) == 6


def test_kept_batches_can_be_looked_at(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file

    tokenizer = AtomasTokenizer.train(["A ring of carbon.", "c1ccccc1"] * 4, 380)
    from atomas.data.batching import collate

    pairs = [
        {"text": "A ring of carbon.", "smiles": "c1ccccc1", "inchikey": "UHOVQNZJYSORNB-UHFFFAOYSA-N"},
        {"text": "A carbon.", "smiles": "CC", "inchikey": "OTMSDBZUPAUEDD-UHFFFAOYSA-N"},
    ]
    batch = collate(pairs, tokenizer, sample_ids=[7, 3], max_text_tokens=64)
    keep_batches(
        tmp_path / "bad" / "step_00000004", 1, [batch], tokenizer, {"step": 4, "losses": {"loss": math.nan}}
    )
    kept = json.loads((tmp_path / "bad/step_00000004/rank_0001.json").read_text())
    assert [pair["sample_id"] for pair in kept["pairs"]] == [7, 3]
    assert [pair["smiles"] for pair in kept["pairs"]] == ["c1ccccc1", "CC"]
    assert kept["pairs"][1]["text"] == "A carbon."
    tensors = load_file(tmp_path / "bad/step_00000004/rank_0001.safetensors")
    assert torch.equal(tensors["0/text/ids"], batch.text.ids)
    assert torch.equal(tensors["0/smiles/lengths"], batch.smiles.lengths)
