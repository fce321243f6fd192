"""Fixtures shared by all tests."""

import logging
import os
from collections.abc import Iterator
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


@pytest.fixture(autouse=True)
def _log_of_a_run_ends_with_its_test() -> Iterator[None]:
    """A run sets the level of this logger and writes to files and a standard error that are gone after the test."""
    logger = logging.getLogger("atomas")
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers[:]
    yield
    for handler in logger.handlers:
        if handler not in handlers:
            handler.close()
    logger.setLevel(level)
    logger.propagate, logger.handlers[:] = propagate, handlers
