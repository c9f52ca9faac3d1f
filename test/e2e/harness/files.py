"""Looking at directories that daemons change meanwhile, and at large sparse files."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)


def below(directory: Path) -> list[Path]:
    """Files and directories below one. What goes away while it is looked at is left out; pathlib's glob breaks then."""
    return [Path(root) / name for root, directories, names in os.walk(directory) for name in (*directories, *names)]


def digest(path: Path) -> str:
    """A hash of what a file holds. Zeros count by the file's length alone, so holes are not read, and it does not matter what is one."""
    found = hashlib.sha256(str(path.stat().st_size).encode())
    with open(path, "rb", buffering=0) as file:
        at = 0
        while (at := _next_data(file.fileno(), at)) >= 0:
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            at -= at % _BLOCK
            while at < end and (block := os.pread(file.fileno(), _BLOCK, at)):
                if block != _ZEROS[:len(block)]:
                    found.update(f"{at}:".encode())
                    found.update(block)
                at += _BLOCK
    return found.hexdigest()


def _next_data(fd: int, at: int) -> int:
    """Where data begins that is not before `at`; -1: nowhere."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return -1
