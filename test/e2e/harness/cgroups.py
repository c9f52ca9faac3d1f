"""The memory cgroup of a process, in either version."""

from __future__ import annotations

from pathlib import Path

from .case import CaseSkipped

_ROOT = Path("/sys/fs/cgroup")


def memory_group(pid: int) -> Path:
    """The directory of the cgroup that limits the process's memory."""
    for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return _ROOT / "memory" / path.strip("/")
        if controllers == "" and (group := _ROOT / path.strip("/")).joinpath("memory.max").exists():
            return group
    raise CaseSkipped("this host limits nobody's memory by cgroups")


def memory_limit(group: Path) -> int:
    """The group's limit in bytes."""
    names = ("memory.max", "memory.limit_in_bytes")
    return int(next(group / name for name in names if (group / name).exists()).read_text(encoding="ascii"))
