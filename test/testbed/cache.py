"""A cache of costly things, keyed by the hash of the recipe that makes them.

An entry is a directory `<kind>-<hash>`. It is built under a temporary name and renamed when it
is whole, under a lock of its own, so parallel runs wait for each other instead of colliding and
an interrupted build leaves nothing that looks finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def root() -> Path:
    """The cache directory, outside any checkout so that a fresh clone finds it again."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "ovms-testbed"
    path.mkdir(parents=True, exist_ok=True)
    return path


def say(message: str) -> None:
    """Prints one progress line on stderr; stdout is left to results."""
    print(f"testbed: {message}", file=sys.stderr, flush=True)


def recipe_key(*parts: str | bytes | Path) -> str:
    """Hashes a recipe; a path stands for the contents of its file, or of every file below it."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
            for file in files:
                digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\1")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the named lock of this cache for the time of the block."""
    with open(root() / f".{name}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def entry(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """Returns the entry's directory, having `build` fill an empty one when there is none yet."""
    dest = root() / f"{kind}-{key}"
    if dest.is_dir():
        return dest
    with locked(f"{kind}-{key}"):
        if dest.is_dir():
            return dest
        tmp = root() / f".tmp-{kind}-{key}"
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        began = time.monotonic()
        say(f"making {kind} (kept in {dest})")
        try:
            build(tmp)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        tmp.rename(dest)
        say(f"{kind} ready after {time.monotonic() - began:.0f} s")
    return dest
