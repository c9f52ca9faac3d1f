"""What one running machine and an idle snapshotter cost in memory (proportional set size of smaps)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measures.beds import native_bed
from bench.report import Figure, bounded
from e2e.harness import process
from e2e.harness.case import CaseFailed

#: Guest memory of a machine for which nobody says a number: `ovms.toml`.
_GUEST_MIB = 512
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")


def measure(_runs: int) -> Iterator[Figure]:
    """VMM, shim and snapshotter of one waiting machine."""
    with native_bed() as bed:
        bed.detached("wait")
        # What start-up touched and gave back is not the machine's cost at rest.
        time.sleep(2)
        vmm = bed.containerd.task_pid("vm")
        yield bounded("VMM beyond its guest's memory", _mib(vmm, beyond=_GUEST_MIB << 20), "MiB PSS", 3)
        shim = _descendant("containerd-shim-ovms-v1")
        yield bounded("shim", _mib(shim), "MiB PSS", 4)
        if not bed.ovms.snapshotter:
            raise CaseFailed("the snapshotter does not run")
        yield bounded("snapshotter, idle", _mib(bed.ovms.snapshotter.pid), "MiB PSS", 20)


def _descendant(name: str) -> int:
    # The kernel keeps 15 characters of a name.
    found = [pid for pid in process.descendants() if name.startswith(_comm(pid)) and len(_comm(pid)) == 15]
    if len(found) != 1:
        raise CaseFailed(f"{len(found)} processes are called {name}")
    return found[0]


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _mib(pid: int, beyond: int = 0) -> float:
    """PSS of a process without the mappings that hold guest memory: those of `beyond` bytes together, largest first."""
    mappings: list[tuple[int, int]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        if match := _MAPPING.match(line):
            mappings.append((int(match[2], 16) - int(match[1], 16), 0))
        elif line.startswith("Pss:"):
            mappings[-1] = (mappings[-1][0], int(line.split()[1]))
    mappings.sort(reverse=True)
    while beyond > 0 and mappings:
        beyond -= mappings.pop(0)[0]
    return sum(pss for _, pss in mappings) / 1024


def whole_mib(pid: int) -> float:
    """PSS of a process with all its mappings."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1]) / 1024  # type: ignore[index]
