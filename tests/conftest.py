"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("ATOMAS_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs the shared folder {name!r}: set ATOMAS_SHARED")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora, or skip."""
    return _shared("data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden numbers, or skip."""
    return _shared("golden")
