"""nerdctl in the place of ctr: its own specs, its logger, its hooks."""

from __future__ import annotations

from e2e.harness import process
from e2e.harness.bed import Bed
from e2e.harness.case import case, check, contains
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

    done = Nerdctl(bed)("run", "--rm", "--net", "none", "-v", "/etc:/data:ro", "--runtime", RUNTIME, image, status=None)

    bed.refused(done, "/data")
