"""SIGKILL at every step of a snapshot, an unpacking and a restore: nothing is lost, and nothing is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from e2e.harness import files, picture, process, steps, tally
from e2e.harness.bed import Bed
from e2e.harness.case import case, check
from e2e.harness.steps import Step
from e2e.harness.terminal import Session

_SHIM, _VMM = "containerd-shim-ovms-v1", "ovms-vmm"
#: For the guest that is large enough for its snapshots to take a while.
_BULK = ("--annotation", "io.ovms.memory=256M")


def _processes(name: str) -> list[int]:
    return [pid for pid, command in process.descendants().items() if name in command.split(" ")[0]]


def _session(bed: Bed, argv: list[str]) -> Session:
    return Session(argv, bed.ovms.env, tty=False, patience=bed.patience * 2)


def _snapshotting(bed: Bed, ref: str) -> Session:
    return _session(bed, [str(bed.ovms.program("ovm")), "snapshot", f"{bed.namespace}/vm", "-t", ref])


def _base(bed: Bed) -> str:
    return tally.pull(bed, bed.registry.push(bed.guests.layout("bulk"), "tally:1", "--preserve-digests"))


def _scratch(bed: Bed, name: str = "") -> list[Path]:
    """Where `ovm snapshot` has machines write, or what of that name is there and not empty."""
    places = [*bed.ovms.state.glob("tmp/snapshot-*"), *bed.ovms.state.glob("scratch/*")]
    return [path for path in (place / name for place in places) if _size(path)]


def _size(path: Path) -> int:
    """Bytes of a file or directory that may go at any moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _store(bed: Bed) -> list[Path]:
    """Blobs that are on their way into the local store."""
    return list(bed.ovms.state.glob("store/blobs/sha256/.tmp-*"))


def _snapshot_steps(bed: Bed) -> Iterator[tuple[Step, str]]:
    """The steps of `ovm snapshot`, each with a reference of its own for the image that it is making."""
    def pushing(tag: str) -> list[Path]:
        return list((bed.dir / "registry/store/docker/registry/v2/repositories").glob(f"{tag}/_uploads/*"))

    def pushed(tag: str) -> list[Path]:
        return list((bed.dir / "registry/store/docker/registry/v2/repositories").glob(f"{tag}/_manifests/tags/1"))

    yield Step("the base image is copied", lambda: _store(bed), lambda: _scratch(bed)), bed.registry.ref("base:1")
    yield Step("memory is written", lambda: _scratch(bed, "ram"), lambda: _scratch(bed, "disk.qcow2")), bed.registry.ref("memory:1")
    yield (Step("the disk is written", lambda: _scratch(bed, "disk.qcow2"), lambda: _scratch(bed, "snapshot.json")),
           bed.registry.ref("disk:1"))
    yield (Step("the image is made", lambda: _scratch(bed, "snapshot.json"), lambda: not _scratch(bed, "ram")),
           bed.registry.ref("image:1"))
    yield Step("the image is pushed", lambda: pushing("push"), lambda: pushed("push")), bed.registry.ref("push:1")


def _still_works(bed: Bed, console: Path, ref: str) -> None:
    """The machine counts on, a snapshot of it makes a good clone, and nothing of those that were killed is left."""
    before = tally.await_counts(bed, console)
    tally.snapshot(bed, "vm", ref)
    tally.end(bed, "vm", console)
    clone = tally.start(bed, tally.pull(bed, ref), "clone")
    check(tally.first(clone) >= before, f"the clone began at {tally.first(clone)}, not behind {before}")
    tally.end(bed, "clone", clone)
    bed.nothing_half_made()
    left = list(bed.ovms.state.glob("scratch/*"))
    check(not left, f"a later snapshot has left {left}")
    # What is made in there is the snapshotter's, which empties it when it starts.
    bed.ovms.kill_snapshotter()
    bed.ovms.start_snapshotter()
    left = list(bed.ovms.state.glob("tmp/*"))
    check(not left, f"the snapshotter has left {left}")


@case(guests=("native",), containerds=("containerd-2.4",), seconds=180)
def ovm_snapshot_dies(bed: Bed) -> None:
    """The client of a snapshot is killed at each of its steps: the machine goes on and later snapshots are whole."""
    console = tally.start(bed, _base(bed), "vm", *_BULK)

    for step, ref in _snapshot_steps(bed):
        def attempt(step: Step = step, ref: str = ref) -> bool:
            # Only what is not there is copied again.
            shutil.rmtree(bed.ovms.state / "store", ignore_errors=True)
            with _snapshotting(bed, ref) as session:
                met = steps.kill_within(step, lambda: [session.pid], session.running, bed.patience * 2)
                session.wait(status=None)
            tally.await_counts(bed, console)
            # Until it has noticed that its client is gone, the machine takes no other snapshot.
            process.until("the machine has given the snapshot up", lambda: all(
                _size(path.parent / "snapshot.json") for path in _scratch(bed, "ram")), bed.patience)
            return met

        steps.until_hit(step, attempt)

    _still_works(bed, console, bed.registry.ref("ram:1"))


@case(guests=("native",), containerds=("containerd-2.4",), seconds=240)
def a_machine_dies_while_its_snapshot_is_taken(bed: Bed) -> None:
    """Shim or VMM are killed at each of its steps: the snapshot fails, the disk is whole, and the container starts again."""
    image = _base(bed)
    for victim in (_SHIM, _VMM):
        console = tally.start(bed, image, "vm", *_BULK)
        for step, ref in list(_snapshot_steps(bed))[1:3]:
            def attempt(step: Step = step, ref: str = ref, victim: str = victim, console: Path = console) -> bool:
                pids = _processes(victim)
                check(len(pids) == 1, f"{victim}: {pids}")
                with _snapshotting(bed, ref) as session:
                    met = steps.kill_within(step, lambda: pids, session.running, bed.patience * 2)
                    # A dead VMM is not asked any more once memory is written; the shim is, until all of it is.
                    told = session.wait(status=None)
                if met and victim == _SHIM:
                    check("ovm:" in told and "sha256:" not in told.splitlines()[-1], f"the snapshot did not fail: {told!r}")
                process.until("containerd has noticed", lambda: bed.containerd.tasks().get("vm") != "RUNNING", bed.patience)
                bed.containerd.ctr("task", "delete", "--force", "vm", status=None)
                bed.nothing_half_made()
                console.unlink()
                bed.containerd.ctr("task", "start", "-d", "--log-uri", f"file://{console}", "vm")
                tally.await_counts(bed, console)
                return met

            steps.until_hit(step, attempt)
        tally.end(bed, "vm", console)
        bed.containerd.collect_garbage()

    console = tally.start(bed, image, "vm", *_BULK)
    _still_works(bed, console, bed.registry.ref("ram:1"))


@case(guests=("native",), containerds=("containerd-2.4",), seconds=240)
def the_snapshotter_dies_while_it_unpacks_ram(bed: Bed) -> None:
    """Killed at each step of unpacking, it begins anew, what it had made half is gone, and what is removed is gone."""
    image, before = tally.image_with_ram(bed, memory="256M", behaviour="bulk")
    ram = bed.ovms.state / "ram"

    def made(name: str) -> list[Path]:
        return [path for path in ram.glob(f".*.new/{name}") if path.is_dir() or _blocks(path)]

    work = (
        Step("the blob is fetched", lambda: _spooled(bed), lambda: made("")),
        Step("memory is written", lambda: made("memory"), lambda: made("parents.json")),
        Step("it is completed", lambda: made("parents.json"), lambda: tally.unpacked(bed)),
        Step("it is there", lambda: tally.unpacked(bed), lambda: False),
    )
    for step in work:
        def attempt(step: Step = step) -> bool:
            for name in bed.image_names():
                bed.containerd.ctr("images", "rm", "--sync", name)
            process.until("all RAM is gone", lambda: not _ram_files(bed), bed.patience)
            tally.pull(bed, image)
            daemon = bed.ovms.snapshotter
            assert daemon
            met = steps.kill_within(step, lambda: [daemon.pid], lambda: not tally.unpacked(bed), bed.patience)
            process.until("its workers are gone", lambda: not _processes("ovms-layer-worker"), bed.patience)
            bed.ovms.kill_snapshotter()
            bed.ovms.start_snapshotter()
            tally.await_ram(bed)
            left = [*ram.glob(".*"), *(bed.ovms.state / "tmp").iterdir()]
            check(not left, f"something half-made is left of a kill while {step.name}: {left}")
            return met

        steps.until_hit(step, attempt)
        # containerd dials again only after a pause that grows with every failure.
        process.until("containerd has found the snapshotter again", lambda: bed.containerd.ctr(
            "snapshots", "--snapshotter", "ovms", "ls", status=None).status == 0, bed.patience)
        console = tally.start(bed, image, "vm")
        check(tally.first(console) >= before, f"it began at {tally.first(console)} after a kill while {step.name}")
        tally.end(bed, "vm", console)

    for name in bed.image_names():
        bed.containerd.ctr("images", "rm", "--sync", name)
    process.until("all RAM is gone", lambda: not _ram_files(bed), bed.patience)


def _blocks(path: Path) -> int:
    try:
        return path.stat().st_blocks
    except FileNotFoundError:
        return 0


def _spooled(bed: Bed) -> bool:
    """Whether the snapshotter is filling a file without a name in its directory of things being made."""
    daemon = bed.ovms.snapshotter
    assert daemon
    for entry in Path(f"/proc/{daemon.pid}/fd").iterdir():
        try:
            if str(entry.readlink()).startswith(f"{bed.ovms.state}/tmp/"):
                return True
        except FileNotFoundError:
            continue
    return False


def _ram_files(bed: Bed) -> list[str]:
    return [str(path) for path in files.below(bed.ovms.state) if "ram" in path.relative_to(bed.ovms.state).parts[:-1]]


class _Restore:
    """The steps of a restore, as the record of the machine tells them."""

    def __init__(self, bed: Bed, namespace: str) -> None:
        self._machines = bed.ovms.runtime / "machines" / namespace

    def record(self) -> dict[str, Any]:
        """The machine's record; empty where there is none."""
        for path in self._machines.glob("*/record.json"):
            try:
                found: dict[str, Any] = json.loads(path.read_bytes())
                return found
            except FileNotFoundError:
                continue
        return {}

    def vmm(self) -> list[int]:
        """The VMM's process id, once it has one."""
        return [self.record()["process"]["pid"]] if self.record().get("process") else []

    def steps(self) -> tuple[Step, ...]:
        """The steps in their order."""
        def state(*names: str) -> Callable[[], bool]:
            return lambda: self.record().get("state") in names

        later = state("created", "running", "stopped")
        return (
            Step("the files are opened", self.record, self.vmm),
            Step("the VMM restores", self.vmm, later),
            Step("the machine is made", later, state("running", "stopped")),
            Step("the guest runs", state("running"), state("stopped")),
        )


@case(guests=("native",), containerds=("containerd-2.4",), seconds=240)
def a_machine_dies_while_it_is_restored(bed: Bed) -> None:
    """Shim or VMM are killed at each step of a start from RAM: the container can be removed, and the next one is restored."""
    image, before = tally.image_with_ram(bed)
    tally.await_ram(bed)
    console = tally.start(bed, image, "vm")
    tally.end(bed, "vm", console)
    bed.containerd.collect_garbage()
    clean = picture.take(bed)
    argv = bed.containerd.argv("run", "-d", "--null-io", "--snapshotter", "ovms", "--runtime", "io.containerd.ovms.v1", image, "vm")
    restore = _Restore(bed, bed.namespace)
    first, *others = restore.steps()
    for victim, work in ((_SHIM, [first, *others]), (_VMM, others)):
        for step in work:
            def attempt(step: Step = step, victim: str = victim) -> bool:
                with _session(bed, argv) as session:
                    shims: list[int] = []
                    while not shims and session.running():
                        shims = _processes(_SHIM)
                    met = steps.kill_within(step, lambda: shims if victim == _SHIM else restore.vmm(), session.running, bed.patience)
                    session.wait(status=None)
                bed.containerd.ctr("task", "kill", "-s", "SIGKILL", "vm", status=None)
                process.until("it has ended", lambda: bed.containerd.tasks().get("vm") != "RUNNING", bed.patience)
                bed.containerd.ctr("task", "delete", "--force", "vm", status=None)
                bed.containerd.ctr("containers", "delete", "vm", status=None)
                bed.await_picture(clean, f"a {victim} was killed while {step.name}")
                return met

            steps.until_hit(step, attempt)

    console = tally.start(bed, image, "vm")
    check(tally.first(console) >= before, f"it began at {tally.first(console)}")
    tally.end(bed, "vm", console)


@case(guests=("native",), containerds=(), seconds=240)
def ovm_run_dies_while_it_restores(bed: Bed) -> None:
    """`ovm run` of an image with RAM is killed at each step: its machine ends with it, and the next run clears up and resumes."""
    before = tally.stored_with_ram(bed, "ram:1", "256M", "bulk")
    argv = [str(bed.ovms.program("ovm")), "run", "ram:1"]
    cache, restore = bed.ovms.state / "cache", _Restore(bed, "ovm")

    def unpacking() -> list[Path]:
        return [path for path in cache.glob("ram/.*.new/memory") if _blocks(path)]

    def unpacked() -> Iterable[Path]:
        return cache.glob("ram/[!.]*/memory")

    def instances() -> list[Path]:
        return list(bed.ovms.state.glob("run/*"))

    work = (
        Step("RAM is unpacked", unpacking, lambda: list(unpacked())),
        Step("the machine is reserved", restore.record, instances),
        Step("the instance is made", instances, restore.vmm),
        *restore.steps()[1:],
    )
    for step in work:
        def attempt(step: Step = step) -> bool:
            if step is work[0]:
                shutil.rmtree(cache)
            with _session(bed, argv) as session:
                met = steps.kill_within(step, lambda: [session.pid], session.running, bed.patience)
                session.wait(status=None)
            process.until("its machine has ended with it", lambda: not _processes(_VMM), bed.patience)
            first = tally.resume(bed, "ram:1")
            check(first >= before, f"it began at {first} after a kill while {step.name}, the origin was at {before}")
            left = [*instances(), *files.below(bed.ovms.runtime / "machines/ovm"), *cache.glob("ram/.*"), *cache.glob("tmp/*")]
            check(not left, f"after a kill while {step.name} the next run has left {left}")
            return met

        steps.until_hit(step, attempt)


@case(guests=("native",), containerds=(), seconds=60)
def ovm_validate_dies(bed: Bed) -> None:
    """`ovm validate` is killed while it unpacks somebody's memory: the next one removes that, and leaves nothing of its own."""
    tally.stored_with_ram(bed, "ram:1", "256M", "bulk")
    tmp = bed.dir / "validating"
    tmp.mkdir()
    argv = ["env", f"TMPDIR={tmp}", str(bed.ovms.program("ovm")), "validate", "--tag", "ram:1", str(bed.ovms.state / "store")]

    def unpacking() -> list[Path]:
        return [path for path in tmp.glob("*/cache/ram/.*.new/memory") if _blocks(path)]

    step = Step("RAM is unpacked", unpacking, lambda: list(tmp.glob("*/cache/ram/[!.]*/memory")))

    def attempt() -> bool:
        with _session(bed, argv) as session:
            met = steps.kill_within(step, lambda: [session.pid], session.running, bed.patience)
            session.wait(status=None)
        left = list(tmp.iterdir())
        check(bool(left) or not met, "a kill has left nothing, so nothing is shown of who removes it")
        process.until("its worker is gone", lambda: not _processes("ovms-layer-worker"), bed.patience)
        process.run(argv, env=bed.ovms.env, timeout=bed.patience * 2)
        left = list(tmp.iterdir())
        check(not left, f"the next one has left {left}")
        return met

    steps.until_hit(step, attempt)
