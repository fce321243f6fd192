"""Public data sets over HTTPS: resumed where they broke off, checked before they get their name."""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter, Retry
from rich.console import Console

from atomas.data.progress import Progress
from atomas.errors import AtomasError

NUM_ATTEMPTS = 4
BACKOFF_S = 0.5
TIMEOUT_S = (10.0, 60.0)
CHUNK_BYTES = 2**13  # what came of a chunk is lost when the connection breaks in it


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file: its name, rows after the header, and the SHA-1 of its git blob (None: not known to us)."""

    name: str
    rows: int
    git_blob_sha1: str | None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A public data set."""

    title: str
    base_url: str
    files: tuple[RemoteFile, ...]


DATASETS = {
    "chebi-20": Dataset(
        title="ChEBI-20 (Text2Mol, MolT5; ChEBI annotations, CC BY 4.0)",
        base_url="https://raw.githubusercontent.com/blender-nlp/MolT5/main/ChEBI-20_data/",
        files=(
            RemoteFile(
                name="train.txt", rows=26_407, git_blob_sha1="c1b42b82fdc8fb5287614e159196e25370763aac"
            ),
            RemoteFile(
                name="validation.txt", rows=3_301, git_blob_sha1="694d328d621966d5c9ad0f36083fdfcf293191d5"
            ),
            RemoteFile(name="test.txt", rows=3_300, git_blob_sha1=None),
        ),
    )
}


def fetch(dataset: Dataset, out: Path, *, base_url: str | None = None) -> None:
    """Download every file of `dataset` into `out` (those already there and right are kept).

    `base_url` names a mirror. A file appears under its name only after its check; what is half loaded
    waits as `.NAME.partial` and is continued by the next call. Raises AtomasError if a file cannot be had
    or is not the expected one.
    """
    console = Console(highlight=False, soft_wrap=True)
    console.print(dataset.title, markup=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _session() as session:
            for file in dataset.files:
                url = (base_url or dataset.base_url).rstrip("/") + "/" + file.name
                how = _fetch_file(session, url, file, out / file.name)
                console.print(f"{out / file.name}: {how}", markup=False)
    except OSError as error:
        # Every requests exception is an OSError too, but those are turned into AtomasError below.
        raise AtomasError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    names = {Path(file.name).stem: out / file.name for file in dataset.files}
    splits = " ".join(f"{name}={path}" for name, path in names.items())
    console.print(f"next: atomas data build --split {splits} --out CORPUS", markup=False)


def git_blob_sha1(path: Path) -> str:
    """The SHA-1 that git gives a file's content: over "blob <bytes>\\0" and the content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _session() -> requests.Session:
    retry = Retry(
        total=NUM_ATTEMPTS,
        connect=1,
        read=0,
        backoff_factor=BACKOFF_S,
        status_forcelist=(429, 500, 502, 503, 504),
        raise_on_status=False,
    )
    session = requests.Session()
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    # A compressed body could not be continued at a byte offset of the file.
    session.headers["Accept-Encoding"] = "identity"
    return session


def _fetch_file(session: requests.Session, url: str, file: RemoteFile, path: Path) -> str:
    """Make `path` the file at `url`; returns how, in words."""
    if path.exists() and not _wrong(path, file):
        return f"already there, {_verified(file)}"
    partial = path.with_name(f".{path.name}.partial")
    resumed = partial.exists() and partial.stat().st_size > 0
    _download(session, url, partial)
    problem = _wrong(partial, file)
    if problem and resumed:
        # The half from an earlier call may be what is wrong: once more, from the start.
        partial.unlink()
        _download(session, url, partial)
        problem = _wrong(partial, file)
    if problem:
        partial.unlink()
        raise AtomasError(
            f"{url} is not the expected file ({problem}): it was changed or damaged on the way; "
            "try again, or name another mirror with --base-url"
        )
    partial.replace(path)
    return f"{path.stat().st_size:,} bytes{' (resumed)' if resumed else ''}, {_verified(file)}"


def _download(session: requests.Session, url: str, partial: Path) -> None:
    """Load `url` to the end of `partial`, continuing after breaks: NUM_ATTEMPTS times without a new byte."""
    failures, reached, reason = 0, 0, ""
    while failures < NUM_ATTEMPTS:
        if failures:
            time.sleep(BACKOFF_S * 2 ** (failures - 1))
        try:
            _download_once(session, url, partial)
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            reason = type(error).__name__
        except requests.RequestException as error:
            raise AtomasError(f"cannot load {url}: {error}") from error
        else:
            return
        size = partial.stat().st_size if partial.exists() else 0
        failures = 1 if size > reached else failures + 1
        reached = max(reached, size)
    raise AtomasError(
        f"cannot load {url}: the connection broke {NUM_ATTEMPTS} times in a row ({reason}); what came is "
        "kept, run the command again to continue, or name a mirror with --base-url"
    )


def _download_once(session: requests.Session, url: str, partial: Path) -> None:
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # Nothing beyond what is here: the check decides whether it is the whole file.
        if not response.ok:
            raise AtomasError(
                f"cannot load {url}: the server answers {response.status_code} {response.reason}; "
                "name a mirror with --base-url"
            )
        continues = response.status_code == requests.codes.partial_content
        length = response.headers.get("Content-Length", "")
        initial = start if continues else 0
        total = initial + int(length) if length.isdigit() else None
        with (
            partial.open("ab" if continues else "wb") as out,
            Progress(partial.name.strip("."), total, unit="B", initial=initial) as progress,
        ):
            for chunk in response.iter_content(CHUNK_BYTES):
                out.write(chunk)
                progress.update(len(chunk))


def _wrong(path: Path, file: RemoteFile) -> str:
    """What tells `path` from `file`; "" if nothing does."""
    if file.git_blob_sha1 is not None:
        found = git_blob_sha1(path)
        return f"git blob {found}, not {file.git_blob_sha1}" if found != file.git_blob_sha1 else ""
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        return "the last line is not complete"
    rows = len(lines) - 2
    return f"{rows:,} rows, not {file.rows:,}" if rows != file.rows else ""


def _verified(file: RemoteFile) -> str:
    if file.git_blob_sha1 is not None:
        return f"git blob {file.git_blob_sha1} verified"
    return f"{file.rows:,} rows counted (no checksum of this file is known)"
