"""Finished rows of a long evaluation, so that one that was cut is continued and not repeated.

FOLDER/settings.json      what the rows were made with
       rank_0000.jsonl    one line {"row": number, "output": text} for each finished row
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from atomas.errors import AtomasError
from atomas.json_files import write_json


class PredictionLog:
    """Rows that are done, of all ranks; each rank appends to a file of its own. Use as a context manager."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, rank: int) -> None:
        """Open `folder`; rank 0 makes it, and the others come after it.

        Raises:
            AtomasError: the rows there were made with other settings.
        """
        self.folder = folder
        wanted = json.loads(json.dumps(settings))
        path = folder / "settings.json"
        if path.exists():
            _compare(json.loads(path.read_text(encoding="utf-8")), wanted, folder)
        elif rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, wanted)
        self._path = folder / f"rank_{rank:04d}.jsonl"
        self._file: TextIO | None = None

    def __enter__(self) -> "PredictionLog":
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        self._file = self._path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")  # ends what a kill cut off, which is then no row
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, outputs: Iterable[tuple[int, str]]) -> None:
        """Write finished rows through to the file."""
        assert self._file is not None
        self._file.writelines(json.dumps({"row": row, "output": output}) + "\n" for row, output in outputs)
        self._file.flush()

    def finished(self) -> dict[int, str]:
        """Output of every finished row, of all ranks; a line that was cut in the middle does not count."""
        rows: dict[int, str] = {}
        for path in sorted(self.folder.glob("rank_*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    rows[entry["row"]] = entry["output"]
                except (ValueError, KeyError, TypeError):
                    continue
        return rows

    def remove(self) -> None:
        """Delete the folder, when its rows are kept elsewhere."""
        for path in (*self.folder.glob("rank_*.jsonl"), self.folder / "settings.json"):
            path.unlink(missing_ok=True)
        self.folder.rmdir()


def _compare(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise AtomasError(
                f"{folder} holds rows made with {key} = {found.get(key)!r}, not {value!r}: "
                "remove it, or choose another --report"
            )
