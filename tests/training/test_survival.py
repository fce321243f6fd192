"""Real runs in which numbers go wrong, disks fill, or a stop comes too late; what doctor says of them afterwards."""

import contextlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from atomas.data.demo import build_demo_corpus
from atomas.distributed.watchdog import LOST_RANK_EXIT_CODE
from atomas.errors import AtomasError
from atomas.training.autopsy import examine
from atomas.training.checkpoint import MANIFEST, publish, verify_checkpoint
from atomas.training.model_files import read_model
from atomas.training.shard_files import SavedShards
from atomas.training.snapshot import read_tensors, read_trainer
from atomas.training.telemetry import read_metrics
from tests.distributed.jobs import Bench, Job
from tests.training.conftest import losses, trainer_state

RESUME = 75


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("survival")
    build_demo_corpus(folder / "corpus", pairs=240, seed=3, workers=1)
    return Bench(folder, faults="tests.training.faulty_training")


def checkpoints(run: Path) -> list[int]:
    """Steps of the complete ones."""
    return sorted(
        int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_????????")
    )


def wait_for(condition: Callable[[], bool], job: Job, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, job.errors()
        assert all(code is None for code in job.codes()), job.errors()
        time.sleep(0.05)


def test_a_loss_that_is_not_finite_on_one_rank_is_left_out_on_all_and_ends_the_run_at_the_limit(
    bench: Bench,
) -> None:
    with bench.job("nan", "--stability.skipped_limit=1", fault=("nan", 1, "3,5")) as job:
        job.wait()
        assert job.codes() == [2, 2], job.errors()
    found = losses(job.run)
    assert [math.isfinite(loss) for loss in found] == [True, True, False, True, False]
    assert "step 3 is left out on all ranks: its loss or gradient is not finite" in job.stderr(0)
    assert "on rank 1; its batches are kept in" in job.stderr(0)
    assert "atomas: error: 2 of the last 100 steps had a loss or gradient that is not finite" in job.stderr(0)
    assert "Traceback" not in job.stderr(0)
    steps = [record for record in read_metrics(job.run) if record["kind"] == "train"]
    assert [step["steps_left_out"] for step in steps] == [0, 0, 1, 1, 2]
    diagnosis = examine(job.run)
    assert (diagnosis.cause, diagnosis.last_step) == ("non-finite", 5)
    assert "bad_steps" in diagnosis.story
    for rank in range(2):
        kept = json.loads((job.run / f"attempts/1/bad_steps/step_00000003/rank_{rank:04d}.json").read_text())
        assert len(kept["pairs"]) == 4
        assert math.isfinite(kept["losses"]["loss"]) == (rank == 0)
    # what is saved is not spoiled
    for path in (job.run / "checkpoints").rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values() if value.is_floating_point())
    assert trainer_state(job.run / "checkpoints/step_00000004")["stability"]["left_out"] == 1


def test_a_run_goes_back_and_on_without_the_data_that_made_its_loss_jump(bench: Bench) -> None:
    """The same as a run that was restarted from the checkpoint and told what to leave out."""
    shape = ("--training.max_steps=14", "--checkpoint.every=4", "--checkpoint.keep_last=9",
             "--stability.spike_window=8", "--stability.spike_steps=2",
             "--stability.spike_score=30", "--stability.rollbacks=1")  # fmt: skip
    with bench.job("spike", *shape, ranks=1, fault=("spike", "all", "9-11")) as job:
        job.wait()
        assert job.codes() == [0], job.errors()
    assert "back to step_00000008, and on without the data of the steps since then" in job.stderr(0)
    assert json.loads((job.run / "data_left_out.json").read_text()) == [[8, 11]]
    assert trainer_state(job.run / "checkpoints/step_00000012")["data_left_out"] == [[8, 11]]
    found = losses(job.run)
    assert len(found) == 14
    assert max(found) < 2 * min(found)
    for step in (12, 14):
        shutil.rmtree(job.run / f"checkpoints/step_{step:08d}")
    assert (
        bench.train("spike", *shape, ranks=1) == found
    )  # from step 8, which knows nothing, with the run's file
    shutil.rmtree(job.run / "checkpoints/step_00000014")
    (job.run / "data_left_out.json").unlink()
    assert bench.train("spike", *shape, ranks=1) == found  # from step 12, which knows


@pytest.mark.slow
def test_a_checkpoint_that_is_due_amid_a_jump_is_not_what_a_run_goes_back_to(bench: Bench) -> None:
    shape = ("--training.max_steps=13", "--checkpoint.every=5", "--checkpoint.keep_last=9",
             "--stability.spike_window=8", "--stability.spike_steps=2",
             "--stability.spike_score=30", "--stability.rollbacks=1")  # fmt: skip
    with bench.job("amid", *shape, ranks=1, fault=("spike", "all", "9-11")) as job:
        job.wait()
        assert job.codes() == [0], job.errors()
    assert "back to step_00000005, and on without the data of the steps since then" in job.stderr(0)
    assert json.loads((job.run / "data_left_out.json").read_text()) == [[5, 11]]


@pytest.mark.slow
def test_a_checkpoint_that_is_asked_for_amid_a_jump_is_not_what_a_run_goes_back_to(bench: Bench) -> None:
    """Nor does it take the place of the last one from before, though one is to be kept."""
    shape = ("--training.max_steps=13", "--checkpoint.every=4", "--checkpoint.keep_last=1",
             "--stability.spike_window=8", "--stability.spike_steps=2",
             "--stability.spike_score=30", "--stability.rollbacks=1")  # fmt: skip
    with bench.job("asked", *shape, ranks=1, fault=("spike_save", "all", "9-11")) as job:
        job.wait()
        assert job.codes() == [0], job.errors()
    assert "saved" in job.stderr(0)
    assert "back to step_00000008, and on without the data of the steps since then" in job.stderr(0)
    assert json.loads((job.run / "data_left_out.json").read_text()) == [[8, 11]]
    aside = job.run / "checkpoints/step_00000010.in_doubt"
    assert trainer_state(aside)["in_doubt"]
    verify_checkpoint(aside)
    assert not trainer_state(job.run / "checkpoints/step_00000013")["in_doubt"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_scale_of_an_fp16_loss_goes_on(bench: Bench, stage: int) -> None:
    """Across stages too: the first steps overflow, which halves the scale and is no trouble."""
    name, options = (
        f"half_{stage}",
        ("--training.precision=fp16", "--training.max_steps=12", "--checkpoint.every=6"),
    )
    half = ("half", "all", 0)

    def train(stage: int) -> list[float]:
        with bench.job(name, *options, f"--deepspeed.zero_stage={stage}", fault=half) as job:
            job.wait()
            assert job.codes() == [0, 0], job.errors()
        return losses(job.run)

    def norms() -> list[float]:
        records = read_metrics(bench.folder / "runs" / name)
        return [record["gradient_norm"] for record in records if record["kind"] == "train"]

    folder = bench.folder / "runs" / name / "checkpoints"
    whole = train(stage)
    assert all(map(math.isfinite, whole))
    assert not math.isfinite(norms()[0])
    assert trainer_state(folder / "step_00000006")["loss_scale"]["cur_scale"] < 2**16
    unscaled = norms()[6]
    scale = trainer_state(folder / "step_00000012")["loss_scale"]
    shutil.rmtree(folder / "step_00000012")
    assert train(stage) == whole
    assert trainer_state(folder / "step_00000012")["loss_scale"] == scale
    shutil.rmtree(folder / "step_00000012")
    elsewhere = train(1)
    assert elsewhere[6] == pytest.approx(whole[6], rel=1e-3)
    assert norms()[6] == pytest.approx(unscaled, rel=1e-2)
    assert trainer_state(folder / "step_00000012")["loss_scale"]["cur_scale"] == scale["cur_scale"]


@pytest.mark.slow
def test_rollbacks_under_zero_3_and_their_end(bench: Bench) -> None:
    shape = ("--training.max_steps=14", "--checkpoint.every=4", "--stability.spike_window=8",
             "--stability.spike_steps=2", "--stability.spike_score=30",
             "--deepspeed.zero_stage=3", "--training.precision=bf16")  # fmt: skip
    with bench.job("zero3", *shape, "--stability.rollbacks=1", fault=("spike", "all", "9-11")) as job:
        job.wait()
        assert job.codes() == [0, 0], job.errors()
    found = losses(job.run)
    assert trainer_state(job.run / "checkpoints/step_00000012")["data_left_out"] == [[8, 11]]
    shutil.rmtree(job.run / "checkpoints/step_00000014")
    (job.run / "data_left_out.json").unlink()
    assert bench.train("zero3", *shape) == found  # from step 12, which knows
    with bench.job("ended", *shape, "--stability.rollbacks=1", fault=("spike", "all", "9-99")) as job:
        job.wait()
        assert job.codes() == [2, 2], job.errors()
    assert examine(job.run).cause == "loss spike"
    assert "after 1 rollbacks" in examine(job.run).story
    with bench.job("logged", *shape, fault=("spike", "all", "9-11")) as job:
        job.wait()
        assert job.codes() == [0, 0], job.errors()
    assert job.stderr(0).count("WARNING loss spike") == 2


@pytest.mark.parametrize(("kill", "where"), [(1, "part"), pytest.param(0, "publish", marks=pytest.mark.slow)])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    bench: Bench, kill: int, where: str
) -> None:
    name = f"killed_{where}"
    with bench.job(name, fault=("kill_in_save", kill, f"4:{where}")) as job:
        job.wait()
        assert job.codes()[kill] == -signal.SIGKILL
        assert job.codes()[1 - kill] == LOST_RANK_EXIT_CODE
    assert checkpoints(job.run) == [2]
    assert (job.run / "LATEST").read_text() == "step_00000002\n"
    assert (job.run / "checkpoints/step_00000004.partial").is_dir()
    first = losses(job.run)
    again = bench.train(name)
    assert again[: len(first)] == first
    assert checkpoints(job.run) == [4, 6]
    assert not list((job.run / "checkpoints").glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_", "rank", "where", "steps"),
    [
        ("SIGTERM", 1, "evaluation", [2]),
        ("SIGUSR1", 0, "first:encoder", [1]),
        ("SIGTERM", 1, "data", [2]),
        ("SIGTERM", 1, "first:checkpoint", [2, 3]),
    ],
)
def test_a_signal_to_one_rank_in_any_phase(
    bench: Bench, signal_: str, rank: int, where: str, steps: list[int]
) -> None:
    """In an evaluation the rest of it is left out; everywhere else the step in flight is finished."""
    name = f"{signal_}_{where.replace(':', '_')}"
    options = ("--evaluation.every=1",) if where == "evaluation" else ()
    with bench.job(name, "--data.num_workers=1", *options, fault=(f"signal:{signal_}", rank, where)) as job:
        job.wait()
        assert job.codes() == [RESUME, RESUME], job.errors()
    done = len(losses(job.run))
    assert done in steps
    assert job.stderr(0).count("stopped after step") == 1
    assert checkpoints(job.run)[-1] == done
    assert ("the evaluation of step 2 is left out" in job.stderr(0)) == (where == "evaluation")
    assert examine(job.run).outcome == "stopped"
    assert len(bench.train(name, "--data.num_workers=1", *options)) == 6


@pytest.mark.slow
def test_a_stop_that_takes_too_long_ends_without_a_save(bench: Bench) -> None:
    """A rank that waits for data for ever, and was asked to stop."""
    slow = Bench(bench.folder)
    with slow.job("overdue", "--run.grace_seconds=2", fault=("sleep", 1, 4)) as job:
        metrics = job.run / "attempts/1/metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count('"train"') >= 3, job)
        os.kill(job.processes[0].pid, signal.SIGTERM)  # it waits in a collective for rank 1
        job.wait(seconds=60)
        assert job.codes() == [RESUME, RESUME], job.errors()
    assert "asked to stop, and the grace time of 2 s is over in step 4" in job.log(0)
    assert "rank 0" in job.last_line(1)
    assert checkpoints(job.run) == [2]
    found = examine(job.run)
    assert (found.outcome, found.steps_lost) == ("stopped", 1)
    assert "grace time" in found.story


@pytest.mark.slow
def test_memory_that_is_not_there_is_told(bench: Bench) -> None:
    with bench.job("memory", fault=("memory", 1, 4)) as job:
        job.wait()
        assert job.codes() == [LOST_RANK_EXIT_CODE, 1], job.errors()
    found = examine(job.run)
    assert (found.cause, found.guilty, found.last_step) == ("out of memory", [1], 3)


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of that size."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Something else takes all room."""
    with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    return disk / "ballast"


@pytest.mark.slow
@pytest.mark.parametrize("failures", [1000, 0])
def test_a_full_disk_leaves_the_checkpoint_that_is_there(bench: Bench, failures: int) -> None:
    """Training goes on and saves when there is room again, or ends at the first failure: as the configuration says."""
    with small_disk(bench.folder / f"small_{failures}", 48) as disk:
        full = Bench(disk, faults=bench.faults)
        (disk / "corpus").symlink_to(bench.folder / "corpus")
        options = (
            "--training.max_steps=9999",
            "--checkpoint.every=5",
            f"--checkpoint.failures_allowed={failures}",
        )
        with full.job("full", *options) as job:
            wait_for(lambda: (job.run / "LATEST").exists(), job)
            ballast = fill(disk)
            if failures:
                wait_for(lambda: "the next checkpoint tries again" in job.stderr(0) + job.stderr(1), job)
                newest = (job.run / "LATEST").read_text()
                verify_checkpoint(job.run / "checkpoints" / newest.strip())
                ballast.unlink()
                wait_for(lambda: (job.run / "LATEST").read_text() != newest, job)
                (job.run / "KILL").touch()
            job.wait()
            codes = job.codes()
        told = job.stderr(0) + job.stderr(1)
        assert "could not be written on rank" in told
        assert "No space left on device" in told
        assert "Traceback" not in told
        verify_checkpoint(job.run / "checkpoints" / (job.run / "LATEST").read_text().strip())
        if failures:
            assert codes == [RESUME, RESUME], told
        else:
            assert set(codes) <= {1, 2}, told  # 1: no room for the line on standard error
            assert examine(job.run).cause == "disk"


class _Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self._touched = touched

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._touched}",)


def _with_pickles(good: Path, checkpoint: Path, names: list[str], touched: Path) -> None:
    """Let `checkpoint` be `good` with pickles as these files, and a manifest that fits them."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    partial = shutil.copytree(good, checkpoint.with_name("hostile"))
    (partial / MANIFEST).unlink()
    for name in names:
        (partial / name).write_bytes(pickle.dumps(_Payload(touched)))
    publish(partial, checkpoint, 2)


def _read_all(checkpoint: Path) -> None:
    """As a run, an evaluation and an export do."""
    read_trainer(checkpoint)
    for name in ("queue.safetensors", "rng/rank_0000.safetensors"):
        read_tensors(checkpoint, name)
    with SavedShards.open(checkpoint) as saved:
        for name in saved.names("master"):
            saved.whole("master", name)
    read_model(checkpoint)
    read_model(checkpoint, momentum=True)


def test_nothing_of_a_checkpoint_is_unpickled(bench: Bench, tmp_path: Path) -> None:
    """Pickles in place of each file, and beside them under the names that others would load."""
    bench.train("hostile", "--training.max_steps=2", ranks=1)
    checkpoint, touched = bench.folder / "runs/hostile/checkpoints/step_00000002", tmp_path / "touched"
    good = shutil.move(checkpoint, tmp_path / "good")
    names = [path.relative_to(good).as_posix() for path in good.rglob("*") if path.is_file()]
    beside = [
        "model/pytorch_model.bin",
        "optim_states.pt",
        "rng/rank_0000.pt",
        "latest",
        "model/spiece.model",
    ]
    for name in sorted(set(names) - {MANIFEST}):
        _with_pickles(good, checkpoint, [name, *beside], touched)
        if name.endswith("tokenizer_config.json"):  # which is for transformers alone
            _read_all(checkpoint)
        else:
            with pytest.raises(AtomasError):
                _read_all(checkpoint)
        assert not touched.exists(), name
    pickle.loads(pickle.dumps(_Payload(touched)))  # the payload works
    assert touched.exists()


@pytest.mark.slow
def test_a_run_does_not_go_on_with_a_pickle(bench: Bench, tmp_path: Path) -> None:
    bench.train("pickled", "--training.max_steps=2", ranks=1)
    checkpoint, touched = bench.folder / "runs/pickled/checkpoints/step_00000002", tmp_path / "touched"
    good = shutil.move(checkpoint, tmp_path / "good")
    _with_pickles(good, checkpoint, ["queue.safetensors", "latest"], touched)
    with bench.job("pickled", "--training.max_steps=3", ranks=1) as job:
        job.wait()
        assert job.codes() == [2], job.errors()
    assert "queue.safetensors" in job.stderr(0).splitlines()[-1]
    assert "Traceback" not in job.stderr(0)
    assert not touched.exists()
