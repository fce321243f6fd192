"""Memory on paper is what runs allocate: tensors to a tenth, of the resident set to a fifth where tensors rule it."""

import json
from dataclasses import replace

import pytest

from atomas.config import Config, DeepSpeedConfig
from atomas.planning.memory import ZERO_STAGES, MemoryPlan, plan_memory
from atomas.planning.model import largest_pairs
from atomas.planning.sizes import T5Sizes
from atomas.planning.workload import PairLengths, Workload
from tests.planning.conftest import CountedRun, Counter

LARGER = (
    "--model.d_model=128", "--model.d_kv=32", "--model.d_ff=512", "--model.num_layers=3",
    "--model.num_decoder_layers=2", "--training.max_steps=3", "--deepspeed.extra={zero_optimization: "
    "{reduce_bucket_size: 1000000}}",
)  # fmt: skip
RESIDENT_FLOOR = 150 * 2**20
"""Libraries that are loaded after the model is built, code that is paged in, arenas of the allocator."""


def _compare(run: CountedRun) -> None:
    report = json.loads((run.folder / "memory.json").read_text(encoding="utf-8"))
    planned, measured = report["planned"], report["measured"]
    assert planned["peak_bytes"] == pytest.approx(run.counted["most_allocated"], rel=0.1)
    for name, held in measured["components"].items():
        assert planned["components"][name]["bytes"] == pytest.approx(held, rel=0.01), name


def test_tensors_of_a_run(count: Counter) -> None:
    _compare(count("memory", *LARGER, "--deepspeed.zero_stage=2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ("--deepspeed.zero_stage=0",),
        ("--deepspeed.zero_stage=0", "--model.dropout_rate=0", "--momentum.queue_size=40000"),
        ("--deepspeed.zero_stage=2", "--model.activation_checkpointing=true", "--data.batch_size=32"),
        ("--deepspeed.zero_stage=1", "--loss.task=both", "--momentum.enabled=false"),
        ("--deepspeed.zero_stage=2", "--training.micro_batch_size=4", "--data.batch_size=32"),
    ],
)
def test_tensors_of_other_runs(count: Counter, keys: tuple[str, ...]) -> None:
    _compare(count("memory", *LARGER, *keys))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [(), ("--model.activation_checkpointing=true", "--deepspeed.zero_stage=0")])
def test_resident_set_of_a_run(count: Counter, keys: tuple[str, ...]) -> None:
    """Resident beyond what was resident before the model was built, which the command itself writes."""
    run = count("traffic", *LARGER, "--data.batch_size=32", "--momentum.queue_size=200000", *keys)
    report = json.loads((run.folder / "memory.json").read_text(encoding="utf-8"))
    planned, measured = report["planned"]["peak_bytes"], report["measured"]["peak_bytes"]
    assert planned > 2 * RESIDENT_FLOOR
    assert planned == pytest.approx(measured - RESIDENT_FLOOR, rel=0.2)


def _plan(stage: int, ranks: int = 8, pairs: int = 16, **keys: object) -> MemoryPlan:
    config = Config(deepspeed=DeepSpeedConfig(**keys))  # type: ignore[arg-type]
    work = Workload(config, T5Sizes.of_model(config.model, 1000), PairLengths.equal(100, 60), pairs, ranks)
    return plan_memory(work, stage)


def _bytes(plan: MemoryPlan, name: str) -> float:
    return sum(component.bytes for component in plan.components if component.name == name)


def test_each_stage_shards_one_part_more() -> None:
    plans = [_plan(stage) for stage in ZERO_STAGES]
    for name, first in (("optimizer states", 1), ("gradients", 2), ("parameters", 3)):
        whole = _bytes(plans[0], name)
        assert [_bytes(plan, name) for plan in plans] == pytest.approx(
            [whole / (8 if stage >= first else 1) for stage in ZERO_STAGES]
        )


def test_offload_leaves_the_device() -> None:
    here, there = _plan(2), _plan(2, offload="cpu")
    moved = _bytes(here, "optimizer states") + _bytes(here, "fp32 masters")
    assert here.total("always") - there.total("always") == pytest.approx(moved)


def test_the_largest_number_of_pairs_fits_and_one_more_does_not() -> None:
    config = Config()
    work = Workload(config, T5Sizes.of_model(config.model, 1000), PairLengths.equal(100, 60), 1, 4)
    limit = 8e9
    pairs = largest_pairs(work, 2, limit)
    peaks = [plan_memory(replace(work, pairs=count), 2).peak for count in (pairs, pairs + 1)]
    assert peaks[0] <= limit < peaks[1]
    assert largest_pairs(work, 2, 1e6) == 0
