"""The cgroups of a process, in either version."""

from __future__ import annotations

from pathlib import Path

from .case import CaseSkipped

_ROOT = Path("/sys/fs/cgroup")


def memory_group(pid: int) -> Path:
    """The directory of the cgroup that limits the process's memory."""
    return _group(pid, "memory", "memory.max")


def cpu_limit(pid: int) -> float:
    """The processors that the process's cgroup may use."""
    group = _group(pid, "cpu", "cpu.max")
    if (group / "cpu.max").exists():
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
    else:
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
    return int(quota) / int(period)


def _group(pid: int, controller: str, file: str) -> Path:
    for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return _ROOT / controllers / path.strip("/")
        if controllers == "" and (group := _ROOT / path.strip("/")).joinpath(file).exists():
            return group
    raise CaseSkipped(f"this host limits nobody's {controller} by cgroups")


def memory_limit(group: Path) -> int:
    """The group's limit in bytes."""
    names = ("memory.max", "memory.limit_in_bytes")
    return int(next(group / name for name in names if (group / name).exists()).read_text(encoding="ascii"))
