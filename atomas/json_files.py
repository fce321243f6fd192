"""JSON files that a reader never sees half written."""

import json
import os
from pathlib import Path
from typing import Any

from atomas.disk import sync


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)  # or a power cut brings the old file back
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk it takes the room of what is tried next
        raise
