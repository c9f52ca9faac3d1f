"""Lists of dataclass instances as JSON files: the form of every report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

Record = TypeVar("Record")


def write(records: Sequence[Any], path: Path) -> None:
    """Writes a report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n", encoding="utf-8")
    scratch.rename(path)


def read(kind: type[Record], path: Path) -> list[Record]:
    """Reads a report written by `write`; one that is not there is empty."""
    if not path.exists():
        return []
    return [kind(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
