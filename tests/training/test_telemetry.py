"""What a step is said to cost: seconds by phase, rates, traces and dashboards."""

import contextlib
import importlib
import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atomas.config import Config, TrackingConfig, TrainingConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.errors import AtomasError
from atomas.model.flops import BackboneSizes, count_step_flops
from atomas.phases import observed_by, phase
from atomas.training import peak_flops as peaks
from atomas.training import timing, tracking
from atomas.training.meter import StepMeter
from atomas.training.telemetry import read_metrics
from atomas.training.timing import OTHER, STEP_PHASES, StepTimer
from atomas.training.tracking import Records
from tests.training.conftest import Trainer

CPU = torch.device("cpu")


class Clock:
    """Stands still unless told otherwise."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_a_moment_belongs_to_its_innermost_phase(clock: Clock) -> None:
    timer = StepTimer(CPU)
    with observed_by(timer):
        clock.now += 1
        with phase("encoder"):
            clock.now += 2
            with phase("communication"):
                clock.now += 4
            clock.now += 8
        with phase("communication"):
            clock.now += 16
        with phase("of no interest"):
            clock.now += 32
        with contextlib.suppress(RuntimeError), phase("decoder"):
            clock.now += 64
            raise RuntimeError
    seconds = timer.lap()
    assert {name: value for name, value in seconds.items() if value} == {
        "encoder": 10, "communication": 20, "decoder": 64, OTHER: 33,
    }  # fmt: skip
    assert seconds.keys() == {*STEP_PHASES, OTHER}
    clock.now += 3
    assert sum(timer.lap().values()) == 3


def test_a_lap_ends_outside_of_all_phases() -> None:
    timer = StepTimer(CPU)
    with observed_by(timer), pytest.raises(AssertionError), phase("encoder"):
        timer.lap()


def _tokens(lengths: list[int]) -> RaggedTokens:
    return RaggedTokens(ids=torch.ones(sum(lengths), dtype=torch.int64), lengths=torch.tensor(lengths))


def _batch(text: list[int], smiles: list[int]) -> PairBatch:
    numbers = torch.arange(len(text))
    return PairBatch(
        text=_tokens(text), smiles=_tokens(smiles), molecule_id=numbers, text_id=numbers, sample_id=numbers
    )


def test_rates_of_an_accumulated_step(clock: Clock) -> None:
    config, sizes = Config(), BackboneSizes.of_model(Config().model, 100)
    meter = StepMeter(config, sizes, CPU, peak_flops=1e9, encoded_twice=False, scored_twice=True)
    clock.now += 100  # an evaluation
    meter.begin()
    meter.count(_batch([5, 7], [3, 2]), queue=0)
    meter.count(_batch([4, 4], [6, 1]), queue=2)
    with observed_by(meter.timer), phase("data"):
        clock.now += 0.5
    clock.now += 1.5
    record = meter.end({"loss": torch.tensor(3.0)}, 0.25)
    assert record["loss"] == 3
    assert (record["step_seconds"], record["seconds/data"], record["seconds/data_max"]) == (2, 0.5, 0.5)
    assert (record["pairs_per_second"], record["tokens_per_second"]) == (2, 32 / 2)
    assert record["padding_avoided"] == pytest.approx(1 - 32 / (14 + 6 + 8 + 12))
    assert record["padding_fraction"] == 0, "on the CPU nothing is padded"
    flops = count_step_flops(config, sizes, [5, 7], [3, 2], scored_twice=True) + count_step_flops(
        config, sizes, [4, 4], [6, 1], queue=2, scored_twice=True
    )
    assert record["flops_per_second"] == flops.model / 2
    assert record["mfu"] == pytest.approx(flops.model / 2e9)
    assert record["hfu"] == pytest.approx(flops.hardware / 2e9)
    assert record["hfu"] > record["mfu"]

    meter.count(_batch([5, 7], [3, 2]), queue=4)
    clock.now += 1
    assert meter.end({"loss": torch.tensor(1.0)}, 0.0)["pairs_per_second"] == 2


def test_every_second_of_a_step_has_a_phase(train: Trainer, tmp_path: Path) -> None:
    """Two ranks; a trace and TensorBoard files beside the metrics."""
    pytest.importorskip("tensorboardX")
    train(
        "run", "--training.max_steps=4", "--training.trace_steps=2-3", "--tracking.tensorboard=true",
        "--evaluation.every=2", "--training.gradient_accumulation_steps=2", ranks=2,
    )  # fmt: skip
    attempt = tmp_path / "runs/run/attempts/1"
    records = read_metrics(tmp_path / "runs/run")
    steps = [record for record in records if record["kind"] == "train"]
    assert len(steps) == 4
    peak = json.loads((attempt / "env.json").read_text())["peak_flops"]
    assert peak["source"].startswith("measured")
    for record in steps:
        seconds = {name: record[f"seconds/{name}"] for name in (*STEP_PHASES, OTHER)}
        assert sum(seconds.values()) == pytest.approx(record["step_seconds"])
        assert all(value > 0 for value in seconds.values()), seconds
        assert record["seconds/data_max"] >= record["seconds/data"]
        assert record["pairs_per_second"] * record["step_seconds"] == pytest.approx(16)
        assert 0 < record["mfu"] < record["hfu"] < 1
        assert 0 < record["padding_avoided"] < 1
        assert record["padding_fraction"] == 0
    spent = {record["kind"]: record["seconds"] for record in records if "seconds" in record}
    assert spent.keys() == {"validation", "checkpoint"}
    assert min(spent.values()) > 0

    for rank in range(2):
        trace = json.loads((attempt / f"trace/rank_{rank:04d}.json").read_text())
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {"step 2", "step 3", *STEP_PHASES} <= names
        assert "step 1" not in names
        assert "step 4" not in names

    shown = dict(_scalars(next((attempt / "tensorboard").iterdir())))
    assert {step for step, _ in shown} == {1, 2, 3, 4}
    for record in records:
        for name, value in record.items():
            if name not in ("kind", "step"):
                key = record["step"], f"{record['kind']}/{name}"
                assert shown[key] == pytest.approx(value, rel=1e-6), key


def _scalars(path: Path) -> Iterator[tuple[tuple[int, str], float]]:
    """Step and tag, and value, of every scalar of an event file: length, two checksums, and an `Event` each."""
    events = importlib.import_module("tensorboardX.proto.event_pb2")
    crc = importlib.import_module("tensorboardX.crc32c").crc32c
    data = path.read_bytes()
    while data:
        size, of_size = struct.unpack("<QI", data[:12])
        body, (of_body,) = data[12 : 12 + size], struct.unpack("<I", data[12 + size : 16 + size])
        assert (of_size, of_body) == tuple(_masked(crc(part)) for part in (data[:8], body))
        event = events.Event.FromString(body)
        for value in event.summary.value:
            yield (event.step, value.tag), value.simple_value
        data = data[16 + size :]


def _masked(checksum: int) -> int:
    return (((checksum >> 15) | (checksum << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _config(**keys: Any) -> Config:
    return Config(tracking=TrackingConfig(**keys))


def test_a_dashboard_that_fails_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    warnings: list[str] = []
    monkeypatch.setattr(tracking.logger, "warning", lambda form, *values: warnings.append(form % values))
    records = Records(_config(tensorboard=True), tmp_path, enabled=True)
    records.write("train", 1, {"loss": 1.0})
    records.write("train", 2, {"loss": "no number"})  # type: ignore[dict-item]
    records.write("train", 3, {"loss": 3.0})
    records.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [step for (step, _), _ in _scalars(next((tmp_path / "tensorboard").iterdir()))] == [1]
    assert len(warnings) == 1
    assert warnings[0].startswith("tracking.tensorboard failed and is switched off: TypeError")
    assert "\n" not in warnings[0]


def test_a_dashboard_that_cannot_be_opened_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX")
    warnings: list[str] = []
    monkeypatch.setattr(tracking.logger, "warning", lambda form, *values: warnings.append(form % values))
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    records = Records(_config(tensorboard=True), tmp_path, enabled=True)
    records.write("train", 1, {"loss": 1.0})
    records.close()
    assert len(warnings) == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(("key", "value"), [("tensorboard", True), ("wandb_project", "p")])
def test_a_missing_package_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AtomasError, match=f"tracking.{key} needs .*pip install") as error:
        Records(_config(**{key: value}), tmp_path, enabled=True)
    assert "\n" not in str(error.value)
    Records(_config(**{key: value}), tmp_path, enabled=False).write("train", 1, {"loss": 1.0})


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    records = Records(_config(wandb_project="atomas"), tmp_path, enabled=True)
    records.write("train", 1, {"loss": 1.0})
    records.close()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in log.read_bytes()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
    ],
)
def test_peaks_of_known_devices(monkeypatch: pytest.MonkeyPatch, name: str, peak: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peaks.peak_flops(torch.device("cuda"), "fp32").per_second == peak


def test_a_peak_is_measured_in_the_dtype_of_the_run() -> None:
    started = time.perf_counter()
    single, half = (peaks.peak_flops(CPU, precision) for precision in ("fp32", "bf16"))
    assert time.perf_counter() - started < 200
    assert all(math.isfinite(peak.per_second) and peak.per_second > 1e7 for peak in (single, half))
    assert single.source.endswith("float32")
    assert half.source.endswith("bfloat16")


@pytest.mark.parametrize(("text", "steps"), [("", []), ("3", [3]), ("12-14", [12, 13, 14])])
def test_steps_to_trace(text: str, steps: list[int]) -> None:
    assert list(TrainingConfig(trace_steps=text).traced) == steps


@pytest.mark.parametrize("text", ["0", "14-12", "3-", "three", "1-2-3"])
def test_wrong_steps_to_trace(text: str) -> None:
    with pytest.raises(AtomasError, match=r"training\.trace_steps"):
        TrainingConfig(trace_steps=text)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times a CUDA stream")
def test_time_of_a_stream() -> None:
    """Host work behind queued kernels takes no time, and waiting for the host does."""
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    torch.mm(matrix, matrix)
    timer = StepTimer(device)
    timer.lap()
    started = time.perf_counter()
    with observed_by(timer):
        with phase("encoder"):
            for _ in range(20):
                torch.mm(matrix, matrix)
        with phase("data"):
            time.sleep(0.01)  # the device is still busy
        with phase("decoder"):
            torch.cuda.synchronize()
            time.sleep(0.1)
    seconds = timer.lap()
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - started, abs=5e-3)
    assert seconds["encoder"] > 0.02
    assert seconds["data"] < 5e-3
    assert seconds["decoder"] == pytest.approx(0.1, abs=0.02)
