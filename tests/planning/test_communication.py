"""Bytes on paper are those that ranks hand to torch.distributed, and those that a network sees."""

from dataclasses import replace
from typing import Any

import pytest

from atomas.config import Config, DeepSpeedConfig, TrainingConfig
from atomas.planning.communication import plan_communication, wire_factor
from atomas.planning.sizes import T5Sizes
from atomas.planning.workload import PairLengths, Workload
from tests.planning.conftest import CountedRun, Counter

TOLERANCE = 0.1


def _compare(run: CountedRun) -> None:
    plan = plan_communication(run.work, run.stage)
    payloads = run.counted["payloads"]
    for kind in {item.kind for item in plan.traffic}:
        planned = sum(item.payload for item in plan.traffic if item.kind == kind)
        assert planned == pytest.approx(payloads[kind], rel=TOLERANCE, abs=1000), kind
    for item in plan.traffic:
        if "tokens of level" in item.source:
            measured = run.counted["ours"][f"{item.kind}: {item.source}"]
            assert item.payload == pytest.approx(measured, rel=TOLERANCE), item.source
    if run.counted["wire"]:  # of all ranks, headers and acknowledgements among them
        assert plan.sent("gloo") == pytest.approx(run.counted["wire"] / run.work.ranks, rel=TOLERANCE)


def test_two_ranks_send_what_is_planned(count: Counter) -> None:
    _compare(count("traffic", "--deepspeed.zero_stage=2", ranks=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "exchange", "ranks", "precision"),
    [
        (3, "allgather", 4, "fp32"),
        (1, "ring", 4, "fp32"),
        (0, "ring", 2, "fp32"),
        (3, "ring", 2, "fp32"),
        (1, "allgather", 4, "bf16"),
        (1, "ring", 2, "bf16_autocast"),
    ],
)
def test_ranks_send_what_is_planned(
    count: Counter, stage: int, exchange: str, ranks: int, precision: str
) -> None:
    # ranks pad to the longest of them, which fewer pairs would make felt
    keys = (
        f"--data.batch_size={8 * ranks}",
        f"--deepspeed.zero_stage={stage}",
        f"--loss.exchange={exchange}",
        f"--training.precision={precision}",
    )
    _compare(count("traffic", *keys, ranks=ranks))


def _work(ranks: int, **keys: object) -> Workload:
    config = Config(deepspeed=DeepSpeedConfig(zero_stage=2))
    config = replace(config, loss=replace(config.loss, **keys))
    return Workload(config, T5Sizes.of_model(config.model, 1000), PairLengths.equal(100, 60), 8, ranks)


def test_one_rank_sends_nothing() -> None:
    assert plan_communication(_work(1), 2).traffic == ()
    assert wire_factor("all_reduce", 1) == 0


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2), ("bf16_autocast", 2)])
def test_the_smaller_modality_travels_and_grows_with_the_ranks(precision: Any, size: int) -> None:
    def tokens(ranks: int, exchange: str) -> float:
        work = _work(ranks, exchange=exchange)
        work = replace(work, config=replace(work.config, training=TrainingConfig(precision=precision)))
        traffic = plan_communication(work, 2).traffic
        return sum(item.sent(ranks) for item in traffic if "tokens of level 0" in item.source)

    count = 8 * 60
    block, gradient = (size * 192 + 4) * count, 4 * (192 + 1) * count
    assert tokens(16, "allgather") == pytest.approx(15 * (block + gradient))
    assert tokens(16, "ring") == pytest.approx(15 * 2 * block + 16 * gradient)


def test_levels_without_weight_do_not_travel() -> None:
    traffic = plan_communication(_work(4, level_weights=(0.0, 1.0, 0.0)), 2).traffic
    assert {item.source for item in traffic if "tokens" in item.source} == {
        "tokens of level 1",
        "gradient of tokens of level 1",
    }
