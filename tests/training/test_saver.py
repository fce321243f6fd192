"""Checkpoints written beside the training, without a training: one process, a snapshot of two small files."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atomas.config import CheckpointConfig
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.training import saver, tensor_files
from atomas.training.checkpoint import (
    list_checkpoints,
    newest_good_checkpoint,
    publish,
    verify_checkpoint,
)
from atomas.training.run_directory import RunDirectory
from atomas.training.saver import Saved, Saver
from atomas.training.snapshot import HostCopies, saved_in_doubt
from atomas.training.tensor_files import write_tensors


class _Snapshot:
    """Stands in for that of a session."""

    def __init__(
        self,
        value: float,
        gate: threading.Event | None = None,
        error: Exception | None = None,
        *,
        in_doubt: bool = False,
    ) -> None:
        self._value, self._gate, self._error, self._in_doubt = value, gate, error, in_doubt

    def write_part(self, folder: Path) -> list[str]:
        if self._gate is not None:
            assert self._gate.wait(60)
        (folder / "shards").mkdir(parents=True)
        write_tensors(folder / "shards/rank_0000.safetensors", {"w": torch.full((100,), self._value)})
        if self._error is not None:
            raise self._error
        return ["shards/rank_0000.safetensors"]

    def write_rest(self, folder: Path) -> None:
        write_json(folder / "trainer.json", {"value": self._value, "in_doubt": self._in_doubt})


class _Bench:
    """A saver, and what a loop does with it."""

    def __init__(self, path: Path, **config: Any) -> None:
        (path / "checkpoints").mkdir(parents=True)
        self.run = RunDirectory(path=path, attempt=1)
        self.saver = Saver(self.run, CheckpointConfig(**config), torch.device("cpu"))
        self.saved: list[Saved] = []
        self.saver.report = self.saved.append

    def begin(
        self, step: int, snapshot: Any = None, *, score: float | None = None, wait: bool = False
    ) -> None:
        self.saver.begin(lambda copies: snapshot or _Snapshot(step), step, score=score, wait=wait)

    def boundary(self) -> None:
        self.saver.advance(self.saver.busy, self.saver.failed)

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.run.checkpoints.iterdir())


def test_a_checkpoint_appears_when_all_is_written(tmp_path: Path) -> None:
    bench, gate = _Bench(tmp_path), threading.Event()
    bench.begin(1, wait=True)
    assert bench.run.name_in("LATEST") == "step_00000001"
    bench.begin(2, _Snapshot(2, gate), score=0.5)
    for _ in range(3):
        bench.boundary()  # steps go by
        assert bench.run.name_in("LATEST") == "step_00000001"
        assert not (bench.run.checkpoints / "step_00000002").exists()
    gate.set()
    bench.saver.finish()
    assert bench.names == ["step_00000001", "step_00000002"]
    assert (bench.run.name_in("LATEST"), bench.run.name_in("BEST")) == ("step_00000002", "step_00000002")
    assert [saved.step for saved in bench.saved] == [1, 2]
    assert bench.saved[1].stalled_seconds <= bench.saved[1].seconds
    manifest = verify_checkpoint(bench.run.checkpoints / "step_00000002")
    assert sorted(manifest["files"]) == ["shards/rank_0000.safetensors", "trainer.json"]


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path: Path) -> None:
    bench, gate = _Bench(tmp_path), threading.Event()
    bench.begin(1, _Snapshot(1, gate))
    threading.Timer(0.2, gate.set).start()
    bench.begin(2, wait=True)
    assert [saved.step for saved in bench.saved] == [1, 2]
    assert bench.saved[0].stalled_seconds > 0.1  # that was the wait
    assert bench.names == ["step_00000001", "step_00000002"]


def test_copies_are_of_the_moment(tmp_path: Path) -> None:
    copies = HostCopies()
    weight = torch.ones(3)
    taken = copies("file", {"w": weight})["w"]
    weight.zero_()
    assert taken.tolist() == [1, 1, 1]
    assert copies("file", {"w": weight})["w"].data_ptr() == taken.data_ptr()  # the memory of the first
    assert copies("file", {"w": weight[:2]})["w"].tolist() == [0, 0]


def test_a_failure_leaves_the_older_checkpoint_and_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = _Bench(tmp_path, failures_allowed=1)
    full = OSError(28, "No space left on device", "shards/rank_0000.safetensors")
    bench.begin(1, score=0.3, wait=True)
    with caplog.at_level("ERROR", logger="atomas"):
        bench.begin(2, _Snapshot(2, error=full), score=0.7)
        assert bench.saver.best_score == 0.7
        bench.saver.finish(must_succeed=False)
    assert len(caplog.messages) == 1
    assert "step_00000002 could not be written on rank 0: [Errno 28] No space left" in caplog.messages[0]
    assert bench.saver.best_score == 0.3
    assert bench.names == ["step_00000001"]
    assert (bench.run.name_in("LATEST"), bench.run.name_in("BEST")) == ("step_00000001", "step_00000001")
    bench.begin(3, wait=True)  # there is room again
    bench.begin(4, _Snapshot(4, error=full))
    bench.saver.finish(must_succeed=False)
    bench.begin(5, _Snapshot(5, error=full))
    with pytest.raises(AtomasError, match=r"step_00000005 could not be written on rank 0.*older ones stay"):
        bench.saver.finish(must_succeed=False)  # the second in a row
    assert bench.names == ["step_00000001", "step_00000003"]


def test_a_checkpoint_that_is_waited_for_by_configuration_may_fail_as_others_may(tmp_path: Path) -> None:
    bench = _Bench(tmp_path, asynchronous=False, failures_allowed=1)
    full = OSError(28, "No space left on device", "shards/rank_0000.safetensors")
    bench.begin(1, _Snapshot(1, error=full))
    assert bench.names == []
    bench.begin(2)
    assert bench.names == ["step_00000002"]
    bench.begin(3, _Snapshot(3, error=full))
    with pytest.raises(AtomasError, match="step_00000004 could not be written"):
        bench.begin(4, _Snapshot(4, error=full))


def test_a_checkpoint_is_there_although_older_ones_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(saver, "prune_checkpoints", refuse)
    bench = _Bench(tmp_path)
    with caplog.at_level("WARNING", logger="atomas"):
        bench.begin(1, score=0.5, wait=True)
    assert caplog.messages == ["older checkpoints could not be removed: [Errno 5] Input/output error"]
    assert [saved.step for saved in bench.saved] == [1]
    assert bench.saver.best_score == 0.5


def test_a_disk_that_is_full_when_a_checkpoint_is_published_is_made_room_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    bench = _Bench(tmp_path, keep_last=1)
    bench.begin(1, wait=True)
    monkeypatch.setattr(RunDirectory, "point", full)
    bench.begin(2)
    bench.saver.finish(must_succeed=False)
    assert bench.names == ["step_00000002"]


def test_the_last_checkpoint_must_not_fail(tmp_path: Path) -> None:
    bench = _Bench(tmp_path, failures_allowed=9)
    with pytest.raises(
        AtomasError, match="step_00000001 could not be written on rank 0: no room for the copies"
    ):
        bench.saver.begin(_no_memory, 1, score=None, wait=True)
    assert bench.names == []


def _no_memory(_copies: Any) -> Any:
    raise MemoryError("no room for the copies")


def test_what_reads_otherwise_than_it_was_written_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tensor_files.save_file

    def bad_disk(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata)
        flip(path, -1)

    bench = _Bench(tmp_path)
    bench.begin(1, wait=True)
    monkeypatch.setattr(tensor_files, "save_file", bad_disk)
    with pytest.raises(AtomasError, match=r"rank_0000.safetensors: w reads otherwise than it was written"):
        bench.begin(2, wait=True)
    assert bench.names == ["step_00000001"]


def test_the_last_the_best_and_every_hundredth_are_kept(tmp_path: Path) -> None:
    bench = _Bench(tmp_path, keep_last=2, keep_every=100)
    for step in (50, 100, 150, 200, 250, 300, 350):
        bench.begin(step, score=1.0 if step == 150 else None)
    bench.saver.finish()
    kept = [
        int(path.name.removeprefix("step_")) for path in reversed(list_checkpoints(bench.run.checkpoints))
    ]
    assert kept == [100, 150, 200, 300, 350]


def test_a_checkpoint_that_was_put_off_stands_for_its_hundred(tmp_path: Path) -> None:
    bench = _Bench(tmp_path, keep_last=1, keep_every=100)
    for step in (90, 103, 110, 190, 200, 202, 290, 310, 320):
        bench.begin(step)
    bench.saver.finish()
    assert bench.names == ["step_00000103", "step_00000200", "step_00000310", "step_00000320"]


def test_the_newest_that_is_not_in_doubt_is_kept_to_go_back_to(tmp_path: Path) -> None:
    bench = _Bench(tmp_path, keep_last=1)
    for step, in_doubt in ((1, False), (2, False), (3, True), (4, True)):
        bench.begin(step, _Snapshot(step, in_doubt=in_doubt))
    bench.saver.finish()
    folder = bench.run.checkpoints
    assert bench.names == ["step_00000002", "step_00000004"]
    latest = bench.run.name_in("LATEST")
    assert newest_good_checkpoint(folder, latest, pytest.fail) == folder / "step_00000004"  # a restart
    chosen = newest_good_checkpoint(folder, None, pytest.fail, in_doubt=saved_in_doubt)
    assert chosen == folder / "step_00000002"
    assert bench.names == ["step_00000002", "step_00000004.in_doubt"]
    bench.begin(4, wait=True)  # the step is saved anew
    assert bench.names == ["step_00000004", "step_00000004.in_doubt"]


def test_where_all_are_in_doubt_there_is_none_to_go_back_to(tmp_path: Path) -> None:
    bench = _Bench(tmp_path)
    bench.begin(1, _Snapshot(1, in_doubt=True), wait=True)
    folder = bench.run.checkpoints
    assert newest_good_checkpoint(folder, None, pytest.fail, in_doubt=saved_in_doubt) is None
    assert bench.names == ["step_00000001"]


def test_names_are_on_the_disk_before_the_checkpoint_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and every folder of it first, then the name that means "complete", then LATEST and its name."""
    done: list[str] = []

    def synced(descriptor: int) -> None:
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))

    monkeypatch.setattr(os, "fsync", synced)
    bench = _Bench(tmp_path)
    bench.begin(1, wait=True)
    partial = "checkpoints/step_00000001.partial"
    before = done[: done.index("checkpoints")]
    for name in ("shards/rank_0000.safetensors", "manifest.json", "shards", "."):
        assert os.path.normpath(f"{partial}/{name}") in before, name
    assert before[-1] == partial
    assert done[len(before) :] == ["checkpoints", ".LATEST.tmp", "."]


@pytest.mark.parametrize("name", ["LATEST", "BEST"])
def test_a_pointer_that_cannot_be_written_is_not_taken_for_a_checkpoint_that_cannot(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    point = RunDirectory.point

    def full(run: RunDirectory, pointer: str, checkpoint: Path) -> None:
        if pointer == name:
            raise OSError(28, "No space left on device")
        point(run, pointer, checkpoint)

    monkeypatch.setattr(RunDirectory, "point", full)
    bench = _Bench(tmp_path)
    bench.begin(1, score=0.5)
    bench.saver.finish(must_succeed=False)
    told = caplog.messages[-1]
    assert told.startswith(
        "checkpoint step_00000001 is whole, but LATEST or BEST could not be made to name it on rank 0: "
    )
    assert "could not be written" not in told
    verify_checkpoint(bench.run.checkpoints / "step_00000001")


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Whatever is done to a file in the block is undone."""
    content = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(content)


def _two_checkpoints(folder: Path) -> Path:
    """A run's `checkpoints` with two; the newest."""
    for step in (1, 2):
        partial = folder / f"step_{step:08d}.partial"
        (partial / "model").mkdir(parents=True)
        write_tensors(partial / "model/model.safetensors", {"w": torch.arange(5.0)})
        (partial / "model/config.yaml").write_text("run:\n  name: a\n")
        write_json(partial / "trainer.json", {"step": step})
        publish(partial, folder / f"step_{step:08d}", step)
    return folder / "step_00000002"


def test_every_flipped_byte_of_every_file_is_reported_by_name(tmp_path: Path) -> None:
    newest = _two_checkpoints(tmp_path)
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        for position in range(path.stat().st_size):
            with damaged(path):
                flip(path, position)
                with pytest.raises(AtomasError) as told:
                    verify_checkpoint(newest)
                assert str(path) in str(told.value), (path, position, told.value)
                assert "step_00000002" in str(told.value)
    verify_checkpoint(newest)


@pytest.mark.parametrize("keep", [0, 0.5, 1])
def test_a_truncated_or_missing_file_is_said_and_the_checkpoint_before_continued(
    tmp_path: Path, keep: float
) -> None:
    newest = _two_checkpoints(tmp_path)
    for path in [path for path in newest.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * (len(content) - 1))])
        warnings: list[str] = []
        chosen = newest_good_checkpoint(tmp_path, newest.name, warnings.append)
        assert chosen is not None
        assert chosen.name == "step_00000001"
        assert len(warnings) == 1
        assert str(path) in warnings[0]
        assert "trying the checkpoint before it" in warnings[0]
        newest.with_name(f"{newest.name}.damaged").rename(newest)
        path.write_bytes(content)
    assert newest_good_checkpoint(tmp_path, newest.name, lambda _: None) == newest
