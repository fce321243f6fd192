"""What is to survive a power cut is on the disk, and so is its name."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk; OSError where they cannot be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems have no such call for folders
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_folders(paths: Iterable[Path], *, top: Path) -> None:
    """Wait until the names of files below `top` are on the disk: those in every folder from theirs up to `top`."""
    folders = {parent for path in paths for parent in path.parents if parent.is_relative_to(top)}
    for folder in sorted(folders, reverse=True):  # the innermost first
        sync(folder)
