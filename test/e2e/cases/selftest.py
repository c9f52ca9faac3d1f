"""The checks that other cases rely on can fail: each is shown what it must find."""

from __future__ import annotations

import os
from pathlib import Path

from e2e.harness import process
from e2e.harness.bed import Bed
from e2e.harness.case import case, check
from e2e.harness.leftovers import Leftovers


@case(vm=False, guests=("native",), containerds=())
def what_a_case_leaves_is_found(bed: Bed) -> None:
    """The check at the end of each case sees processes, mounts, cgroups and network namespaces, unnamed ones too."""
    token = bed.namespace + "x"
    leftovers = Leftovers(token)
    check(not leftovers.find(0), f"before anything is left: {leftovers.find(0)}")
    child = process.spawn(["unshare", "--net", "sleep", "600"])
    mounted = bed.dir / token
    mounted.mkdir()
    process.run(["mount", "-t", "tmpfs", "tmpfs", mounted])
    root = next(path for path in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if path.is_dir())
    groups = [root / f"{token}-g", root / "ovms" / f"ovm-{token}"[:-1]]
    for group in groups:
        group.mkdir(parents=True)
    process.until("it has a namespace of its own", lambda: _net(child.pid) != _net(os.getpid()), bed.patience)
    namespace = _net(child.pid)
    held = os.open(f"/proc/{child.pid}/ns/net", os.O_RDONLY)

    found = leftovers.find(0.3)

    leftovers.remove()
    child.wait()
    still = leftovers.find(0.3)
    os.close(held)
    for wanted in (f"process {child.pid}", f"mount {mounted}", f"network namespace {namespace}", *(f"cgroup {group}" for group in groups)):
        check([line for line in found if line.startswith(wanted)], f"{wanted!r} was not found, only {found}")
    by_descriptor = f"network namespace {namespace}, kept by /proc/self/fd/"
    check(len(still) == 1 and still[0].startswith(by_descriptor), f"found by its descriptor: {still}")
    check(not leftovers.find(0), f"nothing is left any more, but there is {leftovers.find(0)}")


def _net(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")
