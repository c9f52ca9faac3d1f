"""Looks for what a case left on the machine.

A case's temporary directory and containerd namespace carry a token of their own, so what other
programs do meanwhile is never blamed on it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from . import process

#: Seconds. A shim whose containerd has gone tries to deliver its last events for six.
_PATIENCE = 10.0


def _mounts(token: str) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return [fields[4] for fields in map(str.split, lines) if token in fields[4]]


def _cgroups(token: str) -> list[Path]:
    """Every cgroup at or below one named after the case, the deepest first."""
    found = []
    for root, names, _ in os.walk("/sys/fs/cgroup", topdown=False, onerror=lambda _: None):
        found += [Path(root) / name for name in names if token in f"{root}/{name}"]
    return found


def _loops(token: str) -> list[str]:
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if token in backing.read_text(encoding="utf-8"):
                found.append(backing.parts[3])
    return found


def _namespaces(token: str) -> list[str]:
    return [str(path) for path in Path("/run/netns").glob("*") if token in path.name]


def _empty_cgroups() -> set[Path]:
    """Cgroups without a process that `ovm run` made: they have the name of the machine, which may not be the case's own."""
    return {group for group in _machine_cgroups() if not _populated(group)}


def _machine_cgroups() -> set[Path]:
    """All cgroups of machines of `ovm run`, in either version's place."""
    root = Path("/sys/fs/cgroup")
    return {*root.glob("ovms/ovm-*"), *root.glob("*/ovms/ovm-*")}


def _populated(group: Path) -> bool:
    with contextlib.suppress(OSError):
        return bool((group / "cgroup.procs").read_text(encoding="ascii"))
    return False


def _held_namespaces() -> dict[str, str]:
    """Network namespaces that something of this run keeps alive, named or not: namespace → what keeps it.

    That is this process or one below it, which is in the namespace or has a descriptor of it, or a mount outside of
    /run/netns, whose entries have names.
    """
    held: dict[str, str] = {}
    for pid in ("self", *map(str, process.descendants())):
        for link in (Path(f"/proc/{pid}/ns/net"), *_entries(Path(f"/proc/{pid}/fd"))):
            with contextlib.suppress(OSError):
                if (target := os.readlink(link)).startswith("net:["):
                    held.setdefault(target, str(link))
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if fields[3].startswith("net:[") and not fields[4].startswith("/run/netns/"):
            held.setdefault(fields[3], f"the mount {fields[4]}")
    return held


def _entries(directory: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(directory.iterdir())
    return []


class Leftovers:
    """Remembers what was there before a case and finds what is there after it."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._processes = set(process.descendants())
        self._namespaces = set(_held_namespaces())
        # What other programs leave or make meanwhile must not be told from the case's, so it has to stay for all looks.
        self._cgroups_before = _machine_cgroups()
        self._cgroups_always: set[Path] | None = None

    def _seen(self) -> list[str]:
        seen = [f"process {pid} ({name})" for pid, name in process.descendants().items() if pid not in self._processes]
        seen += [f"mount {path}" for path in _mounts(self._token)]
        # runc leaves the empty group of the containerd namespace, the parent of its containers' groups.
        seen += [f"cgroup {path}" for path in _cgroups(self._token) if path.name != self._token]
        seen += [f"loop device {name}" for name in _loops(self._token)]
        seen += [f"network namespace {path}" for path in _namespaces(self._token)]
        seen += [f"network namespace {name}, kept by {by}" for name, by in _held_namespaces().items() if name not in self._namespaces]
        seen += [f"cgroup {path}" for path in sorted(self._stale_cgroups())]
        return seen

    def _stale_cgroups(self) -> set[Path]:
        """Cgroups of `ovm run` that no look at them has missed."""
        found = _empty_cgroups() - self._cgroups_before
        self._cgroups_always = found if self._cgroups_always is None else self._cgroups_always & found
        return self._cgroups_always

    def find(self, patience: float = _PATIENCE) -> list[str]:
        """What is left, after giving it some seconds to go by itself."""
        self._cgroups_always = None
        deadline = time.monotonic() + patience
        while seen := self._seen():
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return seen

    def remove(self) -> None:
        """Ends and removes all of it by force, so that the next case starts clean."""
        for pid in process.descendants():
            if pid not in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
        for path in sorted(_mounts(self._token), reverse=True):
            subprocess.run(["umount", "-l", path], check=False, capture_output=True)
        for name in _loops(self._token):
            subprocess.run(["losetup", "-d", f"/dev/{name}"], check=False, capture_output=True)
        for cgroup in [*_cgroups(self._token), *self._stale_cgroups()]:
            with contextlib.suppress(OSError):
                cgroup.rmdir()
        for path in _namespaces(self._token):
            subprocess.run(["ip", "netns", "delete", os.path.basename(path)], check=False, capture_output=True)
