"""The checks that other cases rely on can fail: each is shown what it must find."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from e2e.harness import process, runner, tally
from e2e.harness.bed import Bed
from e2e.harness.case import Case, CaseFailed, case, check, contains
from e2e.harness.leftovers import Leftovers


def _complaint(holds: Callable[[], object]) -> str:
    """What a check says that fails; fails the case if it does not."""
    try:
        holds()
    except CaseFailed as failure:
        return str(failure)
    raise CaseFailed("the check found nothing")


@case(guests=("native",), containerds=("containerd-2.4",))
def a_flipped_byte_of_a_base_is_found(bed: Bed) -> None:
    """`hashes` covers every kind of file that machines share: one changed byte in any of them is named."""
    image, _ = tally.image_with_ram(bed)
    tally.await_ram(bed)
    tally.end(bed, "vm", tally.start(bed, image, "vm"))
    before = bed.hashes(ram=True)
    bed.unchanged(before)

    for kind in ("/layer/data", "/layer/map", "/layer/table", "/layer/layer.json", "/layer/manifest.json", "blobs/", "/memory", "/state",
                 "/parents.json"):
        name = next((name for name in before if kind in name), "")
        check(name, f"no file {kind} is among {sorted(before)}")
        _flip(bed.ovms.state / name)
        contains(_complaint(lambda: bed.unchanged(before)), name, "the complaint")
        _flip(bed.ovms.state / name)
        bed.unchanged(before)
    memory = next(path for path in tally.unpacked(bed))
    memory.rename(memory.with_name("elsewhere"))
    contains(_complaint(lambda: bed.unchanged(before)), "no memory is among the files", "the complaint")
    memory.with_name("elsewhere").rename(memory)


def _flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


@case(guests=("native",), containerds=("containerd-2.4",))
def what_a_refused_verb_leaves_is_found(bed: Bed) -> None:
    """`refused` sees a snapshot, a directory that no snapshot has, a container, a record and a process, each by itself."""
    image = bed.import_vm("wait")
    bed.patience, patient = 0.5, bed.patience
    ctr = bed.containerd.ctr
    snapshots, tmp = bed.ovms.state / "s", bed.ovms.state / "tmp"
    record = bed.ovms.runtime / "machines/ns/left/record.json"
    child: list[subprocess.Popen[bytes]] = []

    def vmm() -> None:
        child.append(process.spawn(["ovms-vmm", "60"], executable="/bin/sleep"))

    def ended() -> None:
        for one in child:
            one.kill()
            one.wait()

    leaving: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "/left (Active)": (
            lambda: ctr("snapshots", "--snapshotter", "ovms", "prepare", "left"),
            lambda: ctr("snapshots", "--snapshotter", "ovms", "rm", "left")),
        "directories left behind: s/999": ((snapshots / "999").mkdir, (snapshots / "999").rmdir),
        "directories left behind: tmp/new-left": ((tmp / "new-left").mkdir, (tmp / "new-left").rmdir),
        "containers left behind: left": (
            lambda: ctr("containers", "create", "--snapshotter", "ovms", image, "left"), lambda: ctr("containers", "delete", "left")),
        "records left behind: ns/left/record.json": (
            lambda: process.run(["install", "-D", "/dev/null", record]), lambda: shutil.rmtree(record.parent)),
        "processes left behind: ": (vmm, ended),
    }
    for told, (leave, undo) in leaving.items():
        def verb(leave: Callable[[], object] = leave) -> process.Done:
            leave()
            return process.Done(["verb"], 1, "", "no")

        # What the last undoing has left to containerd would be tidied up in the middle of the look.
        bed.containerd.collect_garbage()
        said = _complaint(lambda verb=verb: bed.refused(verb, "no"))
        undo()
        contains(said, told, "the complaint")
    bed.patience = patient
    contains(_complaint(lambda: bed.refused(lambda: process.Done(["verb"], 0, "", "no"))), "went through", "the complaint")
    contains(_complaint(lambda: bed.refused(lambda: process.Done(["verb"], 1, "", "yes"), "no")), "no 'no'", "the complaint")
    bed.refused(lambda: ctr("run", "--rm", "--snapshotter", "ovms", "--runtime", "io.containerd.none.v1", image, "vm", status=None))


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


@case(vm=False, guests=("native",), containerds=())
def what_does_not_run_is_in_the_report(_bed: Bed) -> None:
    """Every case has an outcome for each place and release that was asked for: that of its run, or skipped with the reason."""
    new, old = "containerd-2.4", "containerd-1.7"

    def told(guests: tuple[str, ...], containerds: tuple[str, ...], place: str) -> tuple[list[str], dict[str, str]]:
        runs, skipped = runner.plan(Case("x", lambda _: None, True, guests, containerds, 60), place, (new, old))
        check(all(outcome.result == "skipped" and outcome.reason for outcome in skipped), f"skipped without a word: {skipped}")
        return runs, {outcome.where: outcome.reason for outcome in skipped}

    for guests, containerds, place, runs, skipped in (
        (("native", "stock"), (new, old), "native", [new, old], {}),
        (("native", "stock"), (new, old), "direct", [new, old], {}),
        (("native", "stock"), (new, old), "nested", [new], {f"nested/{old}": "one release of containerd is enough there"}),
        (("native",), (new,), "native", [new], {f"native/{old}": f"it is about {new}"}),
        (("stock",), (old,), "nested", [old], {f"nested/{new}": f"it is about {old}"}),
        (("native",), (new, old), "nested", [], {"nested": "its guests are bare-metal ones, which native runs"}),
        (("stock",), (new, old), "native", [], {"native": "it needs an unmodified Debian: direct or nested"}),
        (("native",), (), "native", [""], {}),
    ):
        found = told(guests, containerds, place)
        check(found == (runs, skipped), f"{guests}, {containerds}, {place}: {found}")


def _net(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")
