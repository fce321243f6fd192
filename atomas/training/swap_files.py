"""Files on a disk of the node that hold what does not fit into memory (`deepspeed.offload: nvme`).

Every process has a folder of its own, which it locks. Whoever starts on the node later removes the folders whose lock
is free: those of processes that were killed. So runs do not disturb each other, and none leaves its files for good.
"""

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
import weakref
from pathlib import Path
from typing import Any

from atomas.errors import AtomasError

_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
_MEGABYTE = 2**20


class SwapFolder:
    """A new folder of this process. It goes with this object, at the latest when the process ends in peace."""

    def __init__(self, parent: Path) -> None:
        """Raises AtomasError: the folder cannot be made, or no direct access to its disk is possible."""
        self._asked = f"deepspeed.nvme_path = {str(parent)!r}"
        prefix = f"atomas-swap-{os.getuid()}-{socket.gethostname()}-"
        if not parent.is_dir():
            raise AtomasError(f"{self._asked}: there is no such folder on {socket.gethostname()}")
        kind = file_system(parent)
        if kind in _IN_MEMORY:
            raise AtomasError(f"{self._asked} is {kind}, which lies in memory; name a folder on a disk")
        try:
            for left_over in parent.glob(f"{prefix}*"):
                _remove_if_free(left_over)
            # it gets the name under which others find it when it is locked
            nameless = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
            lock = os.open(nameless / "lock", os.O_CREAT | os.O_RDWR)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path = nameless.rename(nameless.with_name(nameless.name[1:]))
        except OSError as error:
            raise AtomasError(f"{self._asked} cannot be written to: {error.strerror}") from None
        self.remove = weakref.finalize(self, _remove, self.path, lock, os.getpid())
        """Remove it now"""
        self._check_direct_access()

    def check_space(self, needed: int) -> None:
        """Raise AtomasError where the disk has less than `needed` bytes left, those of all ranks of the node."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise AtomasError(
                f"{self._asked} has {free / 2**20:,.0f} MiB left, the ranks of this node need "
                f"{needed / 2**20:,.0f} MiB"
            )

    def check_operator(self, operator: Any) -> None:
        """Write and read through DeepSpeed's operator, which reports no error of its own.

        Raises:
            AtomasError: what is read is not what was written.
        """
        import torch

        handle = operator.aio_handle(_MEGABYTE, 8, False, True, 1)
        count = (_MEGABYTE + 1024) // 4  # no multiple of a block, as the files have it
        written, read = (handle.new_cpu_locked_tensor(count, torch.empty(0)) for _ in range(2))
        try:
            torch.arange(count, out=written)
            read.zero_()
            file = str(self.path / "trial")
            handle.sync_pwrite(written, file, 0)
            handle.sync_pread(read, file, 0)
            if not torch.equal(written, read):
                raise AtomasError(
                    f"{self._asked}: direct access in units of 1024 bytes fails there; name another disk"
                )
        finally:
            handle.free_cpu_locked_tensor(written)
            handle.free_cpu_locked_tensor(read)
            (self.path / "trial").unlink(missing_ok=True)

    def _check_direct_access(self) -> None:
        trial = self.path / "trial"
        try:
            os.close(os.open(trial, os.O_CREAT | os.O_RDWR | os.O_DIRECT))
        except OSError as error:
            raise AtomasError(
                f"{self._asked}: its file system ({file_system(self.path)}) has no direct access (O_DIRECT): "
                f"{error.strerror}; name a folder on a local disk"
            ) from None
        finally:
            trial.unlink(missing_ok=True)


def reserve(path: str, size: int) -> None:
    """Take the room of a file of the disk now, so that it cannot be full later. Raises OSError."""
    file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(file, 0, size)
    finally:
        os.close(file)


def file_system(path: Path) -> str:
    """Type of the file system in which a path lies; empty where that cannot be told."""
    found, kind = "", ""
    with contextlib.suppress(OSError):
        real = f"{path.resolve()}/"
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
            _, mounted, its_kind, *_ = line.split(" ")
            mounted = mounted.replace("\\040", " ").rstrip("/") + "/"
            if real.startswith(mounted) and len(mounted) >= len(found):
                found, kind = mounted, its_kind
    return kind


def _remove_if_free(folder: Path) -> None:
    with contextlib.suppress(OSError):  # locked, or somebody else removes it
        lock = os.open(folder / "lock", os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _remove(folder: Path, lock: int, process: int) -> None:
    if os.getpid() == process:  # not in a fork of it
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
