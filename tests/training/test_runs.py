"""Whole runs with real DeepSpeed on gloo ranks."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atomas.cli import main
from atomas.training.checkpoint import verify_checkpoint
from atomas.training.telemetry import read_metrics
from tests.training.conftest import Trainer, command, last_record, losses, trainer_state

CHECKPOINTS = "checkpoints"


def test_an_interrupted_run_equals_an_uninterrupted_one(train: Trainer, tmp_path: Path) -> None:
    """Two ranks, ZeRO-2, dropout, accumulation, momentum and queues: every loss, bit for bit."""
    shape = ("--training.gradient_accumulation_steps=2", "--training.max_steps=6", "--data.num_workers=1")
    train("whole", *shape, ranks=2)
    whole = losses(tmp_path / "runs" / "whole")
    assert len(whole) == 6
    train("cut", *shape, "--checkpoint.every=2", ranks=2)
    run = tmp_path / "runs" / "cut"
    newest = run / CHECKPOINTS / "step_00000006"
    shutil.rmtree(newest)  # as if the run had died after step 4 was saved
    train("cut", *shape, "--data.num_workers=2", ranks=2)
    attempts = sorted((run / "attempts").iterdir())
    continued = [json.loads(line) for line in (attempts[1] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in continued if record["kind"] == "train"] == [5, 6]
    assert losses(run) == whole
    one, other = (
        load_file(p / "model" / "momentum.safetensors")
        for p in (newest, tmp_path / "runs/whole" / CHECKPOINTS / newest.name)
    )
    assert all(torch.equal(one[name], other[name]) for name in other)
    # 6 steps x 2 batches x 8 pairs went through a queue of 20
    assert trainer_state(newest)["queue"] == {"cursor": 96 % 20, "filled": 20}
    assert trainer_state(newest)["samples"] == 96


def _continue_elsewhere(
    train: Trainer, runs: Path, first: tuple[int, tuple[str, ...]], then: tuple[int, tuple[str, ...]]
) -> None:
    """Four steps as `first` (ranks, overrides) says, and steps three and four again as `then` does."""
    common = ("--training.max_steps=4", "--model.dropout_rate=0")
    train("run", *common, "--checkpoint.every=2", *first[1], ranks=first[0])
    run = runs / "run"
    (run / CHECKPOINTS / "step_00000004").rename(runs / "whole")
    whole = losses(run)
    done = train("run", *common, *then[1], ranks=then[0])
    assert "step_00000002 at step 2" in done.stderr
    assert losses(run)[:2] == whole[:2]
    assert losses(run) == pytest.approx(whole, rel=1e-4)
    newest = run / CHECKPOINTS / "step_00000004"
    assert trainer_state(newest)["queue"] == trainer_state(runs / "whole")["queue"]
    for name in ("model/momentum.safetensors", "queue.safetensors"):
        one, other = (load_file(folder / name) for folder in (newest, runs / "whole"))
        assert one.keys() == other.keys()
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-3, atol=1e-4)
    files = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert files - {"manifest.json"} == verify_checkpoint(newest)["files"].keys()
    assert sum(name.startswith("shards/") for name in files) == then[0]


def test_a_run_continues_with_fewer_ranks_and_another_stage(train: Trainer, tmp_path: Path) -> None:
    first, then = (2, ("--deepspeed.zero_stage=3",)), (1, ("--deepspeed.zero_stage=1",))
    _continue_elsewhere(train, tmp_path / "runs", first, then)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "then_ranks", "then_stage"), [(1, 1, 2, 3), (2, 2, 4, 0), (4, 3, 2, 1), (2, 1, 4, 3)]
)
def test_a_run_continues_with_other_ranks(
    train: Trainer, tmp_path: Path, ranks: int, stage: int, then_ranks: int, then_stage: int
) -> None:
    first = (ranks, (f"--deepspeed.zero_stage={stage}",))
    then = (then_ranks, (f"--deepspeed.zero_stage={then_stage}",))
    _continue_elsewhere(train, tmp_path / "runs", first, then)


def test_every_metric_is_there(train: Trainer, tmp_path: Path) -> None:
    train("metrics", "--training.max_steps=2", "--evaluation.every=2", "--loss.task=both", ranks=2)
    run = tmp_path / "runs" / "metrics"
    record = last_record(run)
    wanted = {
        "loss", "loss/global", "loss/hierarchical", "loss/level_0", "loss/level_1", "loss/level_2", "loss/lm",
        "recall/text_to_smiles", "recall/smiles_to_text", "temperature", "logit_scale", "learning_rate",
        "gradient_norm", "tokens_per_second", "pairs_per_second", "peak_memory_mb", "step_seconds", "mfu", "samples",
    }  # fmt: skip
    assert wanted <= record.keys()
    total = record["loss/global"] + record["loss/hierarchical"] + record["loss/lm"]
    assert record["loss"] == pytest.approx(total, rel=1e-5)
    assert record["gradient_norm"] > 0
    validation = [r for r in read_metrics(run) if r["kind"] == "validation"]
    assert [r["step"] for r in validation] == [2]
    assert 0 <= validation[0]["text_to_molecule/recall_at_1"] <= 1
    assert (run / "BEST").read_text().strip() == "step_00000002"
    assert (run / "attempts/1/rank_0001.log").is_file()
    assert json.loads((run / "attempts/1/deepspeed.json").read_text())["gradient_clipping"] == 1.0


@pytest.mark.slow
def test_zero_stages_and_world_sizes_give_the_same_losses(train: Trainer, tmp_path: Path) -> None:
    common = ("--training.max_steps=20", "--model.dropout_rate=0", "--evaluation.every=10")
    for stage in range(4):
        train(f"zero{stage}", *common, f"--deepspeed.zero_stage={stage}", ranks=2)
    train("single", *common, ranks=1)
    reference = losses(tmp_path / "runs" / "zero0")
    assert len(reference) == 20
    generation = [r["loss/lm"] for r in read_metrics(tmp_path / "runs" / "zero0") if r["kind"] == "train"]
    assert generation[-1] < generation[0]  # the contrastive losses grow while the queue fills
    for name in ("zero1", "zero2", "zero3", "single"):
        assert losses(tmp_path / "runs" / name) == pytest.approx(reference, rel=1e-4), name
    norms = [last_record(tmp_path / "runs" / f"zero{stage}")["gradient_norm"] for stage in range(4)]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "stage"), [("bf16", 1), ("bf16", 2), ("bf16", 3), ("bf16_autocast", 2)]
)
def test_low_precision_follows_fp32(train: Trainer, tmp_path: Path, precision: str, stage: int) -> None:
    common = ("--training.max_steps=6", "--model.dropout_rate=0", f"--deepspeed.zero_stage={stage}")
    train("fp32", *common, ranks=2)
    train("low", *common, f"--training.precision={precision}", ranks=2)
    assert losses(tmp_path / "runs" / "low") == pytest.approx(losses(tmp_path / "runs" / "fp32"), rel=0.03)
    # the momentum copy follows the fp32 masters, not the rounded weights
    one, other = (
        load_file(tmp_path / "runs" / name / CHECKPOINTS / "step_00000006" / "model" / "momentum.safetensors")
        for name in ("fp32", "low")
    )
    name = "encoder.backbone.t5.shared.weight"
    rounding = (other[name] - other[name].bfloat16().float()).abs().max()
    assert rounding > 0
    torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_bf16_resumes(train: Trainer, tmp_path: Path) -> None:
    for stage in (0, 3):
        shape = ("--training.precision=bf16", f"--deepspeed.zero_stage={stage}", "--training.max_steps=4")
        train(f"bf{stage}", *shape, "--checkpoint.every=2", ranks=2)
        whole = losses(tmp_path / "runs" / f"bf{stage}")
        shutil.rmtree(tmp_path / "runs" / f"bf{stage}" / CHECKPOINTS / "step_00000004")
        train(f"bf{stage}", *shape, ranks=2)
        assert losses(tmp_path / "runs" / f"bf{stage}") == whole


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_continued(
    train: Trainer, tmp_path: Path
) -> None:
    train("run", "--training.max_steps=4", "--checkpoint.every=2")
    run = tmp_path / "runs" / "run"
    whole = losses(run)
    damaged = run / CHECKPOINTS / "step_00000004" / "model" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    done = train("run", "--training.max_steps=4")
    assert (
        "model.safetensors has changed since it was written; trying the checkpoint before it" in done.stderr
    )
    assert "step_00000002 at step 2" in done.stderr
    assert losses(run) == whole
    verify_checkpoint(run / CHECKPOINTS / "step_00000004")  # saved anew
    assert (run / CHECKPOINTS / "step_00000004.damaged").is_dir()

    shutil.rmtree(run / CHECKPOINTS / "step_00000004")
    done = train("run", "--training.max_steps=4")
    assert "step_00000004, is missing; looking for an older one" in done.stderr

    for checkpoint in (run / CHECKPOINTS).glob("step_????????"):
        (checkpoint / "trainer.json").unlink()
    done = train("run", "--training.max_steps=4", code=2)
    assert done.stderr.splitlines()[-1].startswith("atomas: error: no checkpoint in")
    assert "Traceback" not in done.stderr


def test_what_a_run_is_cannot_change_on_resume(train: Trainer, tmp_path: Path) -> None:
    train("run", "--training.max_steps=2")
    for change, name in (
        ("--data.batch_size=4", "data.batch_size = 8"),
        ("--loss.alpha=0.2", "loss.alpha = 0.4"),
    ):
        done = train("run", "--training.max_steps=3", change, code=2)
        assert name in done.stderr.splitlines()[-1]
    done = train("run", "--training.max_steps=3", "--checkpoint.resume=never", code=2)
    assert "already has step_00000002" in done.stderr
    train("run", "--training.max_steps=3")  # a longer run may go on
    assert len(losses(tmp_path / "runs" / "run")) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_saves_and_asks_to_be_resumed(
    corpus: Path, train: Trainer, tmp_path: Path, number: int
) -> None:
    arguments = command(
        corpus, tmp_path / "runs", "run", ["--training.max_steps=500", "--data.num_workers=1"], 1
    )
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "runs/run/attempts/1/metrics.jsonl"
        _wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, process)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors[-2000:]
    steps = len(losses(tmp_path / "runs" / "run"))
    assert 2 <= steps < 500
    assert (tmp_path / "runs/run/checkpoints" / f"step_{steps:08d}" / "manifest.json").is_file()


def test_files_stop_and_save_a_run(corpus: Path, train: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "run"
    arguments = command(corpus, tmp_path / "runs", "run", ["--training.max_steps=500"], 2)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        metrics = run / "attempts/1/metrics.jsonl"
        _wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 1, process)
        (run / "SAVE").touch()
        _wait_for(lambda: any((run / CHECKPOINTS).glob("step_????????")), process)
        assert not (run / "SAVE").exists()
        assert process.poll() is None
        (run / "KILL").touch()
        process.communicate(timeout=120)
    assert process.returncode != 0  # torchrun reports its workers' 75 as its own failure
    assert len(list((run / CHECKPOINTS).glob("step_????????"))) == 2
    steps = len(losses(run))
    done = train("run", "--training.max_steps=500", ranks=2, code=75)
    assert "KILL exists: remove it to go on" in done.stderr
    assert len(losses(run)) == steps


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--run.device=cuda"], "run.device = 'cuda', but torch sees no CUDA device; use --run.device cpu or auto"),
        (["--data.train_split=trian"], "trian"),
        (["--data.validation_split=vlaidation", "--evaluation.every=1"], "vlaidation"),
        (["--data.batch_size=9999"], "data.batch_size = 9999"),
        (["--tokenizer.source=nowhere/at/all"], "nowhere/at/all"),
        (["--model.pretrained=nowhere/at/all"], "model.pretrained = 'nowhere/at/all'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    if overrides == ["--run.device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments = command(corpus, tmp_path / "runs", "run", [*overrides, "--training.max_steps=1"], 1)
    with pytest.raises(SystemExit) as stop:
        main(arguments[arguments.index("train") :])  # in this process: starting one costs seconds
    assert stop.value.code == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("atomas: error: ")
    assert message in line


@pytest.mark.slow
def test_only_as_many_checkpoints_as_asked(train: Trainer, tmp_path: Path) -> None:
    train("run", "--training.max_steps=5", "--checkpoint.every=1", "--checkpoint.keep_last=2")
    names = sorted(path.name for path in (tmp_path / "runs/run/checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000005"]
    assert (tmp_path / "runs/run/LATEST").read_text() == "step_00000005\n"


@pytest.mark.parametrize(
    "ablation",
    [
        ["--loss.global_weight=0"],
        ["--loss.hierarchical_weight=0"],
        ["--loss.lm_weight=0"],
        ["--momentum.enabled=false"],
        ["--model.pooling=position_linear", "--loss.task=gentext"],
        ["--model.pooling=attention", "--model.ratios=[0.5]", "--loss.level_weights=[0, 1]"],
    ],
)  # fmt: skip
@pytest.mark.slow
def test_ablations_train_under_zero_3(train: Trainer, tmp_path: Path, ablation: list[str]) -> None:
    train("run", *ablation, "--training.max_steps=2", "--deepspeed.zero_stage=3", ranks=2)
    assert len(losses(tmp_path / "runs" / "run")) == 2


@pytest.mark.slow
def test_what_only_moves_memory_changes_no_loss(train: Trainer, tmp_path: Path) -> None:
    common = ("--training.max_steps=4", "--model.dropout_rate=0")
    train("plain", *common, ranks=2)
    train("recomputed", *common, "--model.activation_checkpointing=true", ranks=2)
    train("offloaded", *common, "--deepspeed.offload=cpu", ranks=2)
    train("everything", *common, "--deepspeed.offload=cpu", "--deepspeed.zero_stage=3",
          "--model.activation_checkpointing=true", ranks=2)  # fmt: skip
    train("compiled", *common, "--training.compile=true", "--model.activation_checkpointing=true", ranks=2)
    reference = losses(tmp_path / "runs" / "plain")
    for name in ("recomputed", "offloaded", "everything", "compiled"):
        assert losses(tmp_path / "runs" / name) == pytest.approx(reference, rel=1e-5), name


def _wait_for(condition, process: "subprocess.Popen[str]", seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.1)
