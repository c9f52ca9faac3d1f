"""Spawn of the VMM to the first byte of a bare-metal guest, beside the least that any program must do for it."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.report import Figure, compared
from e2e.harness import places, process
from e2e.harness.case import CaseFailed, CaseSkipped
from e2e.harness.ovms import REPO, program

_MEMORY_MIB = 256
_V1_MEMORY = Path("/sys/fs/cgroup/memory")
#: Name of a figure that stands beside those of starts.
AHEAD = "what the engine begins before the spawn"
_FIRST = f"{AHEAD} of its first machine: also KVM_GET_SUPPORTED_CPUID and an empty root"


def measure(runs: int) -> Iterator[Figure]:
    """The start, and the move into a cgroup v1 that it leaves out."""
    if reason := places.without_kvm():
        raise CaseSkipped(reason)
    guest = REPO / "target/guests/bench.elf"
    if not guest.exists():
        raise CaseFailed(f"{guest} is missing: run `make guests`")
    argv = [program("ovms-bench-start"), program("ovms-vmm"), program("ovms-bench-floor"), guest,
            str(_MEMORY_MIB << 20), str(runs * 3)]
    times = json.loads(process.run(argv, timeout=300).out)
    vmm, floor = (statistics.median(times[key]) / 1000 for key in ("vmm_us", "floor_us"))
    yield compared(f"start of ovms-vmm to the first guest byte, {_MEMORY_MIB} MiB", vmm, "ms", "floor program", floor, 2.0)
    ahead = statistics.median(times["ahead_us"]) / 1000
    yield Figure(AHEAD, round(ahead, 3), "ms")
    yield Figure(_FIRST, round(times["ahead_first_us"] / 1000, 3), "ms")
    if _V1_MEMORY.is_dir() and not (_V1_MEMORY / "cgroup.controllers").exists():
        yield Figure("move of one process into a cgroup v1", round(_cgroup_v1_move(runs), 3), "ms")


def _cgroup_v1_move(runs: int) -> float:
    group = _V1_MEMORY / "ovms-bench"
    group.mkdir(exist_ok=True)
    times = []
    try:
        for _ in range(runs):
            with subprocess.Popen(["sleep", "60"]) as sleeper:
                try:
                    began = time.perf_counter()
                    (group / "cgroup.procs").write_text(str(sleeper.pid), encoding="ascii")
                    times.append((time.perf_counter() - began) * 1000)
                finally:
                    sleeper.kill()
    finally:
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.02)
    return statistics.median(times)
