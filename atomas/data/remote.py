"""A corpus on another machine, through fsspec: its shards are fetched in pieces, checked and kept on this node."""

import contextlib
import functools
import os
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tenacity

from atomas.config import StorageConfig
from atomas.data.cache import FileCache
from atomas.data.storage import StoredFile
from atomas.errors import AtomasError

PIECE_BYTES = 8 * 2**20
"""Asked for at once; less of a server that breaks off, so that every request that succeeds brings the end nearer."""

_LEAST_BYTES = 2**13
_LONGEST_PAUSE_S = 30.0
_TRIES_OF_EVICTED = 5


class RemoteFolder:
    """A corpus under an address that fsspec knows: http(s), s3, and others whose package is installed.

    Credentials are those that the scheme's own library finds, such as AWS_* in the environment; for HTTP, in ~/.netrc.
    """

    folder = None

    def __init__(self, address: str, config: StorageConfig) -> None:
        self._address = address.rstrip("/")
        self._config = config
        self._protocol = address.partition("://")[0]
        _check_protocol(self._protocol)
        # of one user: what several share, the first could make the others train on
        cache = Path(config.cache_dir or tempfile.gettempdir(), f"atomas-shards-{os.getuid()}")
        self._ahead: deque[StoredFile] = deque()
        self._fetcher: threading.Thread | None = None
        self._cache = FileCache(cache, int(config.cache_gib * 2**30))

    def __getstate__(self) -> dict[str, Any]:
        """Threads do not go to another process."""
        return {**self.__dict__, "_ahead": deque(), "_fetcher": None}

    def __str__(self) -> str:
        return self._address

    def where(self, path: str) -> str:
        """The address of a file, for messages."""
        return f"{self}/{path}"

    def below(self, folder: str) -> "RemoteFolder":
        """What lies under a longer address."""
        return RemoteFolder(f"{self._address}/{folder}", self._config)

    def read_whole(self, path: str) -> bytes:
        """All bytes of a small file."""
        for attempt in self._retrying():
            with attempt:
                return self._request(path, None, None)
        raise AssertionError("tenacity reraises")

    def check(self, file: StoredFile) -> None:
        """Nothing: a request for every shard would take long, and none is accepted before it was checked."""

    def fetch_ahead(self, files: Sequence[StoredFile]) -> None:
        """Fetch these beside everything else, one by one, where the cache has room for all of them together."""
        if sum(file.bytes for file in files) > self._cache.limit:
            return
        self._ahead = deque(files)
        # each process of the node begins elsewhere
        self._ahead.rotate(-(os.getpid() % max(1, len(files))))
        if self._fetcher is None or not self._fetcher.is_alive():
            self._fetcher = threading.Thread(target=self._fetch_all, daemon=True)
            self._fetcher.start()

    def _fetch_all(self) -> None:
        while True:
            try:
                file = self._ahead.popleft()
            except IndexError:
                return
            # whoever reads the file will meet the same error, and say so
            with contextlib.suppress(OSError, AtomasError, FileNotFoundError):
                name = self.where(file.path)
                self._cache.fetch_ahead(file, name, functools.partial(self._download, file))

    def read(self, file: StoredFile, offset: int, length: int) -> bytes:
        """`length` bytes of `file` from `offset` on, out of the node's cache."""
        for _ in range(_TRIES_OF_EVICTED):
            path = self._cache.get(file, self.where(file.path), functools.partial(self._download, file))
            try:
                with path.open("rb") as opened:
                    opened.seek(offset)
                    return opened.read(length)
            except FileNotFoundError:
                continue  # made room for another
        raise AtomasError(
            f"{self.where(file.path)} was removed from {self._cache.folder} {_TRIES_OF_EVICTED} times before it "
            "could be read: the cache is too small for its readers, raise storage.cache_gib"
        )

    def discard(self, file: StoredFile) -> bool:
        """Drop the copy on this node: the disk may have damaged it."""
        self._cache.drop(file)
        return True

    def _download(self, file: StoredFile, partial: Path) -> None:
        """Append what is missing at the end of `partial`."""
        length = PIECE_BYTES
        with partial.open("ab") as out:
            while out.tell() < file.bytes:
                for attempt in self._retrying():
                    with attempt:
                        if attempt.retry_state.attempt_number > 1:
                            length = max(_LEAST_BYTES, length // 4)
                        data = self._piece(file, out.tell(), min(out.tell() + length, file.bytes))
                out.write(data)
                length = min(PIECE_BYTES, length * 2)

    def _piece(self, file: StoredFile, start: int, stop: int) -> bytes:
        data = self._request(file.path, start, stop)
        if len(data) == stop - start:
            return data
        if len(data) == file.bytes:  # a server that knows no ranges sends all of it
            return data[start:]
        raise OSError(f"the server sent {len(data):,} bytes where {stop - start:,} were asked for")

    def _request(self, path: str, start: int | None, stop: int | None) -> bytes:
        filesystem = _filesystem(self._protocol, self._config.timeout_seconds, os.getpid())
        try:
            return bytes(filesystem.cat_file(f"{self._address}/{path}", start=start, end=stop))
        except FileNotFoundError as error:
            raise FileNotFoundError("the server has no such file") from error
        except Exception as error:  # of the many that aiohttp and botocore have, none is an OSError for sure
            raise _as_os_error(error) from error

    def _retrying(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_attempt(self._config.attempts),
            wait=tenacity.wait_exponential_jitter(initial=0.2, max=_LONGEST_PAUSE_S, jitter=0.2),
            reraise=True,
        )


@functools.lru_cache(maxsize=4)
def _filesystem(protocol: str, timeout: float, process: int) -> Any:
    """One a process: connections and event loops do not survive a fork."""
    import fsspec

    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=20 * timeout, sock_connect=timeout, sock_read=timeout)
        # A compressed body could not be asked for in pieces.
        options["client_kwargs"] = {
            "timeout": limits,
            "headers": {"Accept-Encoding": "identity"},
            "trust_env": True,  # ~/.netrc, and the proxies that *_proxy name
        }
    elif protocol == "s3":
        # One attempt each: it is repeated here, and counted.
        options["config_kwargs"] = {
            "connect_timeout": timeout,
            "read_timeout": timeout,
            "retries": {"total_max_attempts": 1},
        }
    filesystem = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    if protocol == "s3":
        filesystem.retries = 1
    return filesystem


def _check_protocol(protocol: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise AtomasError(
            f"{protocol}:// is not known: use a folder, http(s)://, s3:// or another that fsspec has"
        ) from None
    except ImportError as error:
        raise AtomasError(
            f"{protocol}:// needs a package that is not installed: {error} (for s3:// `pip install '.[s3]'`)"
        ) from None


class _RefusedError(OSError):
    """The server will answer the same the next time."""


def _as_os_error(error: Exception) -> OSError:
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        reason = f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
        permanent = 400 <= status < 500 and status not in (408, 429)
    else:
        text = " ".join(str(error).split())
        reason = f"{type(error).__name__}{': ' if text else ''}{text}"
        permanent = isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError"
    return _RefusedError(reason) if permanent else OSError(reason)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and not isinstance(error, _RefusedError | FileNotFoundError)
