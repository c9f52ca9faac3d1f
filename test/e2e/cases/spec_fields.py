"""Fields of the OCI spec that `ctr run` can set: applied, ignored or refused by name, never silently lost."""

from __future__ import annotations

import os

from e2e.harness import process
from e2e.harness.bed import Bed
from e2e.harness.case import case, check, contains


@case(guests=("native",))
def harmless_flags_start_as_they_are(bed: Bed) -> None:
    """Environment, hostname and user have no meaning for a machine that boots by itself; they do not hinder it. The name is that
    of the VMM's own UTS namespace, and a warning names the variables that are lost."""
    host = os.uname().nodename

    bed.detached("wait", "vm", "--env", "COLOUR=blue", "--env", "PATH=/sbin", "--env", "SHAPE=round", "--hostname", "inside", "--user", "0")

    pid = bed.containerd.task_pid("vm")
    name = process.run(["nsenter", "-t", str(pid), "-u", "uname", "-n"]).out.strip()
    check(name == "inside" and os.uname().nodename == host != "inside", f"the VMM's host is {name!r}, ours {os.uname().nodename!r}")
    warnings = [line for line in bed.containerd.log.splitlines() if "do not reach the guest" in line]
    check(len(warnings) == 1, f"warnings: {warnings}")
    contains(warnings[0], "level=warning", "the warning")
    contains(warnings[0], 'so these environment variables do not reach the guest: COLOUR, SHAPE" id=vm', "the warning")


@case(guests=("native",))
def privileged_starts(bed: Bed) -> None:
    """`--privileged` gives the VMM nothing, and the machine starts."""
    done = bed.vm(bed.import_vm("poweroff"), "vm", "--rm", "--privileged")

    contains(done.out, bed.guests.ready("poweroff"), "the guest's console")


@case(guests=("native",))
def a_bind_volume_is_refused_by_name(bed: Bed) -> None:
    """A bind mount that would be lost is refused with its destination."""
    image = bed.import_vm("poweroff")

    mount = ("--mount", "type=bind,src=/etc,dst=/data,options=rbind:ro")
    bed.refused(lambda: bed.vm(image, "vm", "--rm", *mount, status=None), "/data")


@case(guests=("native",))
def a_device_is_refused_by_name(bed: Bed) -> None:
    """A host device that would be lost is refused by its path."""
    image = bed.import_vm("poweroff")

    bed.refused(lambda: bed.vm(image, "vm", "--rm", "--device", "/dev/fuse", status=None), "/dev/fuse")


@case(guests=("native",))
def arguments_without_an_agent_are_refused(bed: Bed) -> None:
    """Arguments behind the id need an agent in the image; without one they are refused, not ignored."""
    image = bed.import_vm("poweroff")

    bed.refused(lambda: bed.vm(image, "vm", "--rm", args=("/bin/echo", "hi"), status=None), "agent")


@case(guests=("native",))
def the_hosts_network_is_kept_out(bed: Bed) -> None:
    """`--net-host` leaves the spec without a network namespace: the machine gets an empty one of its own."""
    bed.detached("wait", "vm", "--net-host")

    pid = bed.containerd.task_pid("vm")
    theirs, ours = os.readlink(f"/proc/{pid}/ns/net"), os.readlink("/proc/self/ns/net")
    check(theirs != ours, "the VMM is in the host's network namespace")
