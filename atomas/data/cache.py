"""Files of other machines on a disk of this one: shared by all of a user's processes of a node, bounded in size.

    DIR/<sha256>              a whole file, checked; its modification time is when it was last asked for
        <sha256>.<bytes>.partial  as much of it as has come
        locks/<xx>            held while a file whose checksum begins with xx is fetched

Named by its checksum, a file serves every corpus that has it, and none can be taken for another.
"""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from atomas.data.storage import StoredFile
from atomas.errors import AtomasError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"[0-9a-f]{64}(\.[0-9]+\.partial)?")
_PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT)

Download = Callable[[Path], None]
"""Appends to the given file what is missing at its end."""


class FileCache:
    """Whole files by their checksum, at most `limit` bytes of them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def get(self, file: StoredFile, name: str, download: Download) -> Path:
        """Where the file is, after fetching it if need be: one process does, the others wait for it.

        Another process may remove it at any time: open it at once, and ask again where it is gone. `name` is for
        messages.

        Raises:
            AtomasError: the folder cannot be written, or has no room.
            OSError: what `download` raises, and bytes that are not those of the index.
        """
        path = self._path(file)
        self._check_owner()
        if self._is_there(path, file):
            return path
        try:
            with self._lock(path):
                if not self._is_there(path, file):
                    self._fetch(path, file, name, download)
        except OSError as error:
            if error.filename is None or not str(error.filename).startswith(str(self.folder)):
                raise
            raise AtomasError(
                f"cannot write {error.filename}: {error.strerror or error}; set storage.cache_dir to another folder"
            ) from error
        return path

    def fetch_ahead(self, file: StoredFile, name: str, download: Download) -> None:
        """Fetch the file if it is not there and nobody else does so; raises what `get` raises."""
        path = self._path(file)
        self._check_owner()
        if self._is_there(path, file):
            return
        lock = self._lock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return
        try:
            if not self._is_there(path, file):
                self._fetch(path, file, name, download)
        finally:
            lock.release()

    def drop(self, file: StoredFile) -> None:
        """Remove a file whose bytes have changed."""
        self._path(file).unlink(missing_ok=True)

    def _path(self, file: StoredFile) -> Path:
        if not _SHA256.fullmatch(file.sha256):
            raise AtomasError(f"the index is damaged: {file.sha256!r} is no SHA-256")
        return self.folder / file.sha256

    def _check_owner(self) -> None:
        """Whoever may write there decides what is read."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self.folder.stat().st_uid != os.getuid():
                raise AtomasError(
                    f"{self.folder} belongs to another user: remove it, or set storage.cache_dir to another folder"
                )

    def _is_there(self, path: Path, file: StoredFile) -> bool:
        try:
            if path.stat().st_size != file.bytes:
                return False
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _lock(self, path: Path) -> FileLock:
        locks = self.folder / "locks"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        locks.mkdir(exist_ok=True)
        return FileLock(locks / path.name[:2])

    def _fetch(self, path: Path, file: StoredFile, name: str, download: Download) -> None:
        partial = path.with_name(f"{path.name}.{file.bytes}{_PARTIAL}")
        resumed = partial.exists()
        self._make_room(file, name, partial)
        while True:
            self._download(partial, name, download)
            found = _sha256(partial)
            if found == file.sha256:
                os.replace(partial, path)
                return
            partial.unlink()
            if not resumed:  # nothing of an earlier try, which may be what was wrong, was in it
                raise OSError(
                    errno.EIO,
                    f"what came has the checksum {found[:16]}, not {file.sha256[:16]} as in the index",
                )
            resumed = False

    def _download(self, partial: Path, name: str, download: Download) -> None:
        while True:
            try:
                return download(partial)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                if not self._evict_oldest(partial):
                    raise AtomasError(
                        f"no room for {name} in {self.folder} ({os.strerror(error.errno)}): make room there, or set "
                        "storage.cache_dir to a folder of another disk"
                    ) from error

    def _make_room(self, file: StoredFile, name: str, partial: Path) -> None:
        """Remove what was not asked for the longest until the file fits."""
        if file.bytes > self.limit:
            raise AtomasError(
                f"{name} has {file.bytes:,} bytes, more than the whole cache may have: raise storage.cache_gib "
                f"above {file.bytes / 2**30:.2g}"
            )
        with FileLock(self.folder / "locks" / "room"):
            partial.touch()  # reserves its bytes: the name says how many
            while sum(_expected_bytes(path) for path in self._entries()) > self.limit:
                if not self._evict_oldest(partial):
                    break  # all the rest is being fetched by others this moment

    def _evict_oldest(self, partial: Path) -> bool:
        """Remove one entry other than `partial`; False if there is none that nobody is fetching."""
        for path in sorted(self._entries(), key=_last_use):
            if path == partial:
                continue
            if path.name.endswith(_PARTIAL):
                lock = self._lock(path)
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                path.unlink(missing_ok=True)
                lock.release()
            else:
                path.unlink(missing_ok=True)
            return True
        return False

    def _entries(self) -> Iterator[Path]:
        """What this class has written; anything else in the folder is somebody's."""
        return (path for path in self.folder.iterdir() if _ENTRY.fullmatch(path.name))


def _expected_bytes(path: Path) -> int:
    if path.name.endswith(_PARTIAL):
        return int(path.name.split(".")[1])
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _last_use(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
