"""Where the files of a corpus lie, and how their bytes are obtained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from atomas.addresses import check_address
from atomas.config import StorageConfig
from atomas.errors import AtomasError


class StoredFile(Protocol):
    """What the index says of a file: enough to fetch and to check it."""

    @property
    def path(self) -> str:
        """Relative to the corpus."""
        ...

    @property
    def bytes(self) -> int:
        """Its size."""
        ...

    @property
    def sha256(self) -> str:
        """Its checksum, hexadecimal."""
        ...


class Storage(Protocol):
    """The files of one corpus.

    Holds no open file or connection that a fork or a pickle would carry over. Bytes come unchecked: whoever decodes
    them compares their checksum with the index.
    """

    @property
    def folder(self) -> Path | None:
        """The folder, where it lies on a file system of this machine."""
        ...

    def where(self, path: str) -> str:
        """The full name of a file, for messages."""
        ...

    def below(self, folder: str) -> "Storage":
        """What lies in a folder of it."""
        ...

    def read_whole(self, path: str) -> bytes:
        """All bytes of a small file. FileNotFoundError if there is none, other OSErrors as they come."""
        ...

    def check(self, file: StoredFile) -> None:
        """Notice on opening, where that is cheap, that a file is missing or has another size. AtomasError says so."""
        ...

    def fetch_ahead(self, files: Sequence[StoredFile]) -> None:
        """These files are read next, in about this order: have them come meanwhile. Returns at once, never fails."""
        ...

    def read(self, file: StoredFile, offset: int, length: int) -> bytes:
        """`length` bytes of `file` from `offset` on, fewer where it ends before. OSError where it cannot be read."""
        ...

    def discard(self, file: StoredFile) -> bool:
        """The bytes of `file` were not those of the index: True if another read may give other ones."""
        ...


class LocalFolder:
    """A corpus in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def where(self, path: str) -> str:
        """The full name of a file, for messages."""
        return str(self.folder / path)

    def below(self, folder: str) -> "LocalFolder":
        """What lies in a folder of it."""
        return LocalFolder(self.folder / folder)

    def read_whole(self, path: str) -> bytes:
        """All bytes of a small file."""
        return (self.folder / path).read_bytes()

    def check(self, file: StoredFile) -> None:
        """Compare the size on disk with that of the index."""
        path = self.folder / file.path
        try:
            size = path.stat().st_size
        except OSError as error:
            raise AtomasError(
                f"shard {path} cannot be read: {error.strerror or error}; "
                "restore it or build the corpus again"
            ) from error
        if size != file.bytes:
            raise AtomasError(
                f"shard {path} has {size} bytes where the index says {file.bytes}: "
                "restore it or build the corpus again"
            )

    def fetch_ahead(self, files: Sequence[StoredFile]) -> None:
        """They are here."""

    def read(self, file: StoredFile, offset: int, length: int) -> bytes:
        """`length` bytes of `file` from `offset` on."""
        with (self.folder / file.path).open("rb") as opened:
            opened.seek(offset)
            return opened.read(length)

    def discard(self, file: StoredFile) -> bool:
        """Nothing else could be read in its place."""
        return False


def open_storage(location: Path | str, config: StorageConfig | None = None) -> Storage:
    """The storage that a folder or an address (`file:`, `http(s)://`, `s3://`, ...) names.

    Raises AtomasError for a scheme that is unknown or needs a package that is not installed, and for a password in the
    address.
    """
    if isinstance(location, Path) or not is_address(location):
        return LocalFolder(Path(location))
    if location.startswith("file:"):
        return LocalFolder(Path(unquote(urlsplit(location).path)))
    check_address(location)
    from atomas.data.remote import RemoteFolder

    return RemoteFolder(location, config or StorageConfig())


def is_address(location: str) -> bool:
    """Whether a location names a scheme: a plain path does not."""
    return "://" in location or location.startswith("file:")
