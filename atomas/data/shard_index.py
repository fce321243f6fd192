"""The index of a corpus: its splits, shards and blocks with their checksums, and what was counted when it was built."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from atomas.data.blocks import BlockTable
from atomas.data.storage import Storage
from atomas.disk import sync
from atomas.errors import AtomasError
from atomas.version import __version__

FORMAT = "atomas-shards/2"
INDEX_NAME = "index.json"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file; `path` is relative to the corpus folder."""

    path: str
    bytes: int
    sha256: str
    num_records: int
    blocks: BlockTable

    def to_json(self) -> dict[str, Any]:
        """As the index stores it."""
        return {
            "path": self.path,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "num_records": self.num_records,
            "blocks": self.blocks.to_json(),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Shard":
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is damaged."""
        return Shard(**{**value, "blocks": BlockTable.from_json(value["blocks"])})


@dataclass(frozen=True, kw_only=True)
class SplitIndex:
    """What the index says of one split."""

    num_records: int
    shards: tuple[Shard, ...]

    def to_json(self) -> dict[str, Any]:
        """As the index stores it."""
        return {"num_records": self.num_records, "shards": [shard.to_json() for shard in self.shards]}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "SplitIndex":
        """The inverse of `to_json`; KeyError, TypeError or ValueError where it is damaged."""
        shards = tuple(Shard.from_json(shard) for shard in value["shards"])
        return SplitIndex(num_records=value["num_records"], shards=shards)


class HasShards(Protocol):
    """A split, as the index or a reader knows it."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """In order."""
        ...


def write_index(
    directory: Path,
    splits: Mapping[str, SplitIndex],
    *,
    counts: Mapping[str, Any],
    hazards: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    alignment: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write `directory/index.json` atomically, as the last file of a corpus; returns its content.

    `splits` maps each split's name to what its writer's `index()` returned; the other arguments, of any
    name, are stored as given (JSON values).
    """
    index: dict[str, Any] = {
        "format": FORMAT,
        "splits": {name: split.to_json() for name, split in splits.items()},
        "fingerprint": corpus_fingerprint(splits),
        "counts": dict(counts),
        "hazards": dict(hazards),
        "alignment": dict(alignment or {}),
        "sources": [dict(source) for source in sources],
        "options": dict(options),
        "versions": {
            "atomas": __version__,
            "python": platform.python_version(),
            "rdkit": version("rdkit"),
            "pyarrow": version("pyarrow"),  # whose zstd compresses
        },
        **more,
    }
    rewrite_index(directory, index)
    return index


def rewrite_index(directory: Path, index: Mapping[str, Any]) -> None:
    """Put `index` in place of the one that is there, atomically.

    Its last line is the SHA-256 of all lines before it, so that a flipped bit anywhere is noticed.
    """
    path = Path(directory) / INDEX_NAME
    partial = path.with_name(INDEX_NAME + ".partial")
    # A line for each of its parts: the columns of blocks are long.
    parts = [f"{json.dumps(name)}: {_compact_json(value)},\n" for name, value in index.items()]
    content = ("{\n" + "".join(parts)).encode()
    with partial.open("wb") as file:
        file.write(content)
        file.write(_checksum_line(content))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def corpus_fingerprint(splits: Mapping[str, HasShards]) -> str:
    """SHA-256 over the shards' SHA-256 in order."""
    digest = hashlib.sha256()
    for split in splits.values():
        for shard in split.shards:
            digest.update(shard.sha256.encode())
    return digest.hexdigest()


def read_index(storage: Storage) -> dict[str, Any]:
    """The index of a corpus, as it was written; AtomasError where there is none or it is damaged."""
    name = storage.where(INDEX_NAME)
    try:
        content = storage.read_whole(INDEX_NAME)
        index = json.loads(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AtomasError(
            f"{storage} is not a built corpus (it has no {INDEX_NAME}): "
            f"make one with `atomas data build FILE --out {storage}`"
        ) from error
    except OSError as error:
        raise AtomasError(f"cannot read {name}: {error.strerror or error}") from error
    except ValueError as error:
        raise AtomasError(f"{name} is damaged ({error}): build the corpus again") from error
    found = index.get("format") if isinstance(index, dict) else None
    if found != FORMAT:
        raise AtomasError(
            f"{name} has format {found!r}, this version reads {FORMAT!r}: build the corpus again"
        )
    lines = content[: content.rfind(b'"checksum": ')]
    if index.pop("checksum", None) is None or content != lines + _checksum_line(lines):
        raise AtomasError(
            f"{name} is damaged or was changed by hand (its checksum does not fit): "
            "restore it or build the corpus again"
        )
    return dict(index)


def _checksum_line(content: bytes) -> bytes:
    return f'"checksum": "{hashlib.sha256(content).hexdigest()}"\n}}\n'.encode()


def _compact_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
