"""Rows come back as they went, from wherever they wait."""

import os
import resource
import signal
from typing import Any

import pytest
import torch

from atomas.errors import AtomasError
from atomas.model.row_store import row_store


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_rows_come_back(place: Any) -> None:
    store = row_store(place, torch.device("cpu"))
    rows = [
        torch.randn(n, 3, dtype=dtype)
        for n, dtype in ((4, torch.float32), (0, torch.float32), (2, torch.float64))
    ]
    rows.append(torch.randn(5, 3).to(torch.bfloat16))
    for part in rows:
        store.append(part)
    assert len(store) == len(rows)
    for number in (2, 0, 3, 1):
        assert torch.equal(store[number], rows[number])
        assert store[number].dtype == rows[number].dtype
    store[0] = rows[0] + 1
    assert torch.equal(store[0], rows[0] + 1)
    assert torch.equal(store[2], rows[2])


def test_what_comes_from_disk_can_be_written_and_leaves_no_file(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = row_store("disk", torch.device("cpu"))
    store.append(torch.ones(2, 2))
    store[0].add_(1)
    assert torch.equal(store[0], torch.ones(2, 2))
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_one_line() -> None:
    """A limit on file sizes stands in for the disk: the write fails alike."""
    store = row_store("disk", torch.device("cpu"))
    store.append(torch.ones(10, 10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(AtomasError, match=r"TMPDIR .* training\.feature_cache"):
            store.append(torch.ones(1000, 10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(store[0], torch.ones(10, 10))
