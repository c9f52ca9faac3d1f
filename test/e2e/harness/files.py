"""Looking at directories that daemons change meanwhile."""

from __future__ import annotations

import os
from pathlib import Path


def below(directory: Path) -> list[Path]:
    """Files and directories below one. What goes away while it is looked at is left out; pathlib's glob breaks then."""
    return [Path(root) / name for root, directories, names in os.walk(directory) for name in (*directories, *names)]
