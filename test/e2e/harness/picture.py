"""What there is of machines at one moment, to be compared with what there is after a verb that was refused."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from . import files, process

if TYPE_CHECKING:
    from .bed import Bed

#: Programs of which each machine, and each unpacking, has a process of its own.
_PROGRAMS = ("ovms-vmm", "containerd-shim-", "ovms-layer-worker", "--keeper")


@dataclass(frozen=True)
class Picture:
    """Everything that a verb which fails half-way could leave."""

    #: What the snapshotter's own store holds: key and kind.
    snapshots: frozenset[str]
    containers: frozenset[str]
    tasks: frozenset[str]
    #: Below the state directory: a snapshot's files, things being made, machines of `ovm run`.
    directories: frozenset[str]
    #: Records and sockets of machines.
    records: frozenset[str]
    processes: frozenset[str]

    @property
    def consistent(self) -> bool:
        """Whether each snapshot of the store has a directory, and there is no other."""
        return len(self.snapshots) == sum(path.startswith("s/") for path in self.directories)

    def difference(self, later: Picture) -> str:
        """What a later picture has more and less, in words; empty if they are equal."""
        told = []
        for field in fields(self):
            before, after = getattr(self, field.name), getattr(later, field.name)
            if more := sorted(after - before):
                told.append(f"{field.name} left behind: {', '.join(more)}")
            if less := sorted(before - after):
                told.append(f"{field.name} gone: {', '.join(less)}")
        return "; ".join(told)


def take(bed: Bed) -> Picture:
    """The picture of this moment. A containerd that has not been started has nothing."""
    snapshots: set[str] = set()
    containers: set[str] = set()
    tasks: set[str] = set()
    if bed.has_containerd:
        snapshots = set(bed.containerd.stored_snapshots(bed.ovms.socket))
        containers = set(bed.containerd.ctr("containers", "ls", "-q").out.split())
        tasks = {f"{name} ({state})" for name, state in bed.containerd.tasks().items()}
    state, machines = bed.ovms.state, bed.ovms.runtime / "machines"
    directories = {path for place in ("s", "tmp", "run", "cache/tmp") for path in _entries(state / place)}
    making = (path for place in ("ram", "cache/ram", "store/blobs/sha256") for path in _entries(state / place))
    directories |= {path for path in making if path.name.startswith(".")}
    return Picture(
        frozenset(snapshots), frozenset(containers), frozenset(tasks),
        frozenset(str(path.relative_to(state)) for path in directories),
        frozenset(str(path.relative_to(machines)) for path in files.below(machines) if not path.is_dir()),
        frozenset(f"{pid} ({name[:80]})" for pid, name in process.descendants().items() if any(word in name for word in _PROGRAMS)),
    )


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []
