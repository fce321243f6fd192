"""DuckDB within a bound of memory, and what is asked of it again and again."""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]


class open_database:  # noqa: N801
    """A DuckDB database in a file, with a bound on its memory; what does not fit goes beside it."""

    def __init__(self, path: Path, memory_mb: int) -> None:
        import duckdb

        self._path = path
        self._database = duckdb.connect(
            str(path),
            config={
                "memory_limit": f"{memory_mb}MB",
                "temp_directory": f"{path}.spilled",
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            },
        )

        self._database.execute("SET enable_progress_bar = false")  # it would write to stdout

    def __enter__(self) -> Any:
        return self._database

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import duckdb

        self._database.close()
        if isinstance(error, duckdb.IOException | duckdb.OutOfMemoryException):
            raise OSError(None, str(error).splitlines()[0], str(self._path)) from error


def replace_records(database: Any, query: str) -> None:
    """Table `records` becomes the result of a query on it (an UPDATE would keep every change in memory)."""
    database.execute(f"CREATE TABLE next AS {query}")
    database.execute("DROP TABLE records")
    database.execute("ALTER TABLE next RENAME TO records")


def count(database: Any, what: str) -> int:
    """Rows of a table (`what` may go on with WHERE)."""
    return int(database.execute(f"SELECT count(*) FROM {what}").fetchone()[0])


def batches(database: Any, query: str) -> Iterator[list[Array]]:
    """Columns of integers of a query, some ten thousand rows at a time."""
    for batch in database.cursor().sql(query).to_arrow_reader(65_536):
        yield [column.to_numpy(zero_copy_only=False).astype(np.int64) for column in batch.columns]
