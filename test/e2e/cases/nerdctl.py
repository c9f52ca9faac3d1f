"""nerdctl in the place of ctr: its own specs, its logger, its hooks."""

from __future__ import annotations

from pathlib import Path

from e2e.harness import process
from e2e.harness.bed import Bed
from e2e.harness.case import case, check, contains
from e2e.harness.cgroups import memory_group, memory_limit
from e2e.harness.nerdctl import Nerdctl
from e2e.harness.ovms import RUNTIME


@case(guests=("native",))
def run_attached(bed: Bed) -> None:
    """`nerdctl run --rm` shows the console and exits as the machine did."""
    image = bed.import_vm("poweroff")

    done = Nerdctl(bed)("run", "--rm", "--net", "none", "--runtime", RUNTIME, image)

    contains(done.out, bed.guests.ready("poweroff"), "the guest's console")


@case(guests=("native",))
def life_of_a_detached_machine(bed: Bed) -> None:
    """run -d, logs, pause, unpause, stats, inspect, stop and rm."""
    nerdctl = Nerdctl(bed)
    nerdctl("run", "-d", "--net", "none", "--name", "vm", "--runtime", RUNTIME, bed.import_vm("wait"))
    process.until("the log has the console", lambda: bed.guests.ready("wait") in nerdctl("logs", "vm").text, bed.patience)

    nerdctl("pause", "vm")
    contains(nerdctl("inspect", "vm", "--format", "{{.State.Status}}").out, "paused", "the inspected state")
    nerdctl("unpause", "vm")
    contains(nerdctl("stats", "--no-stream").out, "vm", "nerdctl stats")
    nerdctl("stop", "vm")

    contains(nerdctl("ps", "-a").out, "Exited (0)", "nerdctl ps")
    contains(nerdctl("logs", "vm").text, "power button", "the log")
    nerdctl("rm", "vm")
    check(not nerdctl("ps", "-a", "-q").out.strip(), "a container is left")
    bed.nothing_half_made()


@case(guests=("native",))
def a_volume_is_refused_by_name(bed: Bed) -> None:
    """`-v` would be lost in a machine without an agent, so it is refused with its destination."""
    image = bed.import_vm("poweroff")

    nerdctl = Nerdctl(bed)

    bed.refused(lambda: nerdctl("run", "--rm", "--net", "none", "-v", "/etc:/data:ro", "--runtime", RUNTIME, image, status=None), "/data")


_MIB = 1 << 20


@case(guests=("stock",))
def update_takes_memory_and_gives_it_back(bed: Bed) -> None:
    """`update -m` below what the guest has makes its balloon give memory up before the cgroup's limit falls."""
    nerdctl, group = _running(bed, "-m", "256m")
    overhead = memory_limit(group) - 256 * _MIB

    nerdctl("update", "-m", "192m", "vm")
    check(memory_limit(group) == 192 * _MIB + overhead, f"the limit is {memory_limit(group)}, {overhead} of it overhead")
    nerdctl("update", "-m", "256m", "vm")
    check(memory_limit(group) == 256 * _MIB + overhead, f"the limit is {memory_limit(group)} after the memory was given back")

    nerdctl("stop", "vm")
    nerdctl("rm", "vm")


@case(guests=("native",))
def update_without_a_balloon_is_refused(bed: Bed) -> None:
    """A guest without a balloon driver keeps its memory, and the limit stays; other limits change."""
    nerdctl, group = _running(bed, "-m", "64m")
    before = memory_limit(group)

    nerdctl("update", "-m", "256m", "vm")
    check(memory_limit(group) == before + 192 * _MIB, f"the limit went from {before} to {memory_limit(group)}")
    refused = nerdctl("update", "-m", "48m", "vm", status=None)

    contains(refused.text, "balloon", "the refusal")
    check(refused.status != 0 and memory_limit(group) == before + 192 * _MIB, f"the limit is {memory_limit(group)}")
    nerdctl("stop", "vm")
    nerdctl("rm", "vm")


def _running(bed: Bed, *flags: str) -> tuple[Nerdctl, Path]:
    """A machine that waits, and the directory of its memory cgroup."""
    nerdctl = Nerdctl(bed)
    image = bed.import_vm("wait")
    nerdctl("run", "-d", "--net", "none", "--name", "vm", "--runtime", RUNTIME, *flags, image)
    process.until("the log has the console", lambda: bed.guests.ready("wait") in nerdctl("logs", "vm").text, bed.patience)
    return nerdctl, memory_group(int(nerdctl("inspect", "vm", "--format", "{{.State.Pid}}").out))
