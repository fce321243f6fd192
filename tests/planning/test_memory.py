"""Memory on paper is what runs allocate, to a tenth."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from atomas.config import Config, DeepSpeedConfig, ModelConfig, TrainingConfig
from atomas.planning.memory import ZERO_STAGES, MemoryPlan, plan_memory
from atomas.planning.model import largest_pairs
from atomas.planning.offload import SUB_GROUP
from atomas.planning.sizes import T5Sizes
from atomas.planning.workload import PairLengths, Workload
from atomas.training.nvme import operator_file
from atomas.training.swap_files import file_system
from tests.planning.conftest import CountedRun, Counter

LARGER = (
    "--model.d_model=128", "--model.d_kv=32", "--model.d_ff=512", "--model.num_layers=3",
    "--model.num_decoder_layers=2", "--training.max_steps=3",
)  # fmt: skip
WIDER = ("--data.batch_size=32", "--momentum.queue_size=20000")


def _compare(run: CountedRun, small: float = 0) -> None:
    report = json.loads((run.folder / "memory.json").read_text(encoding="utf-8"))
    planned, measured = report["planned"], report["measured"]
    locked = planned["components"].get("swap buffers", {"bytes": 0})["bytes"]  # not of torch's allocator
    assert planned["peak_bytes"] - locked == pytest.approx(run.counted["most_allocated"], rel=0.1)
    for name, held in measured["components"].items():
        assert planned["components"][name]["bytes"] == pytest.approx(held, rel=0.01, abs=small), name


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
        ("--deepspeed.zero_stage=2", "--deepspeed.offload=cpu"),
        ("--deepspeed.zero_stage=3",),
        ("--deepspeed.zero_stage=3", "--deepspeed.offload=cpu"),
        ("--deepspeed.zero_stage=2", "--training.precision=bf16", "--data.batch_size=32"),
    ],
)
def test_tensors_of_other_runs(count: Counter, keys: tuple[str, ...]) -> None:
    _compare(count("memory", *LARGER, *keys))


@pytest.mark.skipif(not operator_file().exists(), reason="DeepSpeed's async_io operator is not compiled here")
@pytest.mark.slow
def test_tensors_of_a_run_with_nvme(count: Counter, tmp_path: Path) -> None:
    if file_system(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip(f"{tmp_path} lies in memory")
    wide = ("--model.d_model=256", "--model.d_ff=2048", "--momentum.forward=layerwise")
    extra = "--deepspeed.extra={zero_optimization: {reduce_bucket_size: 1000000, sub_group_size: 600000}}"
    nvme = (
        "--deepspeed.zero_stage=3",
        "--deepspeed.offload=nvme",
        f"--deepspeed.nvme_path={tmp_path}",
        extra,
    )
    run = count("memory", *LARGER, *wide, *nvme)
    _compare(run, small=2**15)  # of tensors that are too small for a file
    planned = json.loads((run.folder / "memory.json").read_text(encoding="utf-8"))["planned"]["components"]
    assert planned["masters and states, swapped"]["bytes"] > 20 * planned["optimizer states"]["bytes"]


def _measured(run: CountedRun) -> None:
    """What `atomas train` tells its user."""
    measured = json.loads((run.folder / "memory.json").read_text(encoding="utf-8"))["measured"]
    assert measured["steps"] == 3
    assert measured["planned_bytes"] > 40 * 2**20
    assert measured["peak_bytes"] == pytest.approx(measured["planned_bytes"], rel=0.1)


def test_a_run_measures_what_it_has_planned(count: Counter) -> None:
    _measured(count("traffic", *LARGER, *WIDER, "--deepspeed.zero_stage=2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        ("--deepspeed.zero_stage=0",),
        ("--deepspeed.zero_stage=3",),
        ("--deepspeed.zero_stage=2", "--deepspeed.offload=cpu"),
        ("--deepspeed.zero_stage=3", "--deepspeed.offload=cpu"),
        ("--deepspeed.zero_stage=1", "--model.activation_checkpointing=true"),
        ("--deepspeed.zero_stage=2", "--training.micro_batch_size=8", "--training.feature_cache=host"),
    ],
)
def test_other_runs_measure_what_they_have_planned(count: Counter, keys: tuple[str, ...]) -> None:
    _measured(count("traffic", *LARGER, *WIDER, *keys))


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
    beside = ("momentum masters", "checkpoint copies", "fp32 gradients", "buffers of the offload")
    moved += sum(_bytes(there, name) for name in beside)
    assert there.total("always", "host") == pytest.approx(moved)


def test_the_largest_number_of_pairs_fits_and_one_more_does_not() -> None:
    config = Config()
    work = Workload(config, T5Sizes.of_model(config.model, 1000), PairLengths.equal(100, 60), 1, 4)
    limit = 8e9
    pairs = largest_pairs(work, 2, limit)
    peaks = [plan_memory(replace(work, pairs=count), 2).peak for count in (pairs, pairs + 1)]
    assert peaks[0] <= limit < peaks[1]
    assert largest_pairs(work, 2, 1e6) == 0


def test_nvme_leaves_the_host_too() -> None:
    """Of a large model: what is left are gradients, buffers and small tensors."""
    sizes = {
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 4096,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 16,
    }
    config = Config(
        model=ModelConfig(**sizes),  # type: ignore[arg-type]
        training=TrainingConfig(precision="bf16"),
        deepspeed=DeepSpeedConfig(zero_stage=3, offload="nvme", nvme_path="/scratch"),
    )
    work = Workload(config, T5Sizes.of_model(config.model, 32128), PairLengths.equal(100, 60), 16, 8)
    plan = plan_memory(work, 3)
    share = work.parameters.total / 8
    swapped = {name: _bytes(plan, name) for name in ("masters and states, swapped", "parameters, swapped")}
    assert plan.total("always", "nvme") == sum(swapped.values())
    assert swapped["masters and states, swapped"] == pytest.approx(12 * share, rel=0.01)
    matrices = 8 * 24 + 24  # of the feed-forward layers; a rank's eighth of the others is under 1 MiB
    assert swapped["parameters, swapped"] == pytest.approx(2 * matrices / 2 * 2**22 / 8, rel=0.1)
    largest = SUB_GROUP + 2**19
    buffers = 12 * largest + 2 * (5 * 32128 * 1024 / 8 + largest)
    assert _bytes(plan, "swap buffers") == pytest.approx(buffers, rel=0.02)
