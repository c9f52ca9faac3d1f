"""SIGKILL at any moment of a snapshot, an unpacking or a restore: nothing is lost, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from e2e.harness import files, process, tally
from e2e.harness.bed import Bed
from e2e.harness.case import case, check
from e2e.harness.terminal import Session

#: Seconds after the beginning of what is interrupted.
_DELAYS = (0.0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4)


def _processes(name: str) -> list[int]:
    return [pid for pid, command in process.descendants().items() if name in command.split(" ")[0]]


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _session(bed: Bed, argv: list[str]) -> Session:
    return Session(argv, bed.ovms.env, tty=False, patience=bed.patience * 2)


def _snapshotting(bed: Bed, ref: str) -> Session:
    return _session(bed, [str(bed.ovms.program("ovm")), "snapshot", f"{bed.namespace}/vm", "-t", ref])


def _base(bed: Bed) -> str:
    return tally.pull(bed, bed.registry.push(bed.guests.layout("tally"), "tally:1", "--preserve-digests"))


def _still_works(bed: Bed, console: Path, ref: str) -> None:
    """The machine counts on, and a snapshot of it makes a good clone."""
    before = tally.await_counts(bed, console)
    tally.snapshot(bed, "vm", ref)
    tally.end(bed, "vm", console)
    clone = tally.start(bed, tally.pull(bed, ref), "clone")
    check(tally.first(clone) >= before, f"the clone began at {tally.first(clone)}, not behind {before}")
    tally.end(bed, "clone", clone)
    bed.nothing_half_made()


@case(guests=("native",), containerds=("containerd-2.4",), seconds=120)
def ovm_snapshot_dies(bed: Bed) -> None:
    """The client of a snapshot is killed: the machine goes on and later snapshots are whole."""
    console = tally.start(bed, _base(bed), "vm", *tally.SMALL)
    ref = bed.registry.ref("ram:1")

    for delay in _DELAYS:
        with _snapshotting(bed, ref) as session:
            time.sleep(delay)
            session.signal(signal.SIGKILL)
            session.wait(status=None)
        tally.await_counts(bed, console)

    _still_works(bed, console, ref)


@case(guests=("native",), containerds=("containerd-2.4",), seconds=180)
def a_machine_dies_while_its_snapshot_is_taken(bed: Bed) -> None:
    """Shim or VMM are killed: the snapshot fails, the disk is whole, and the container starts again."""
    image = _base(bed)
    ref = bed.registry.ref("ram:1")
    for victim in ("containerd-shim-ovms-v1", "ovms-vmm"):
        console = tally.start(bed, image, "vm", *tally.SMALL)
        for delay in _DELAYS[::2]:
            with _snapshotting(bed, ref) as session:
                time.sleep(delay)
                _kill(_processes(victim))
                session.wait(status=None)
            process.until("containerd has noticed", lambda: bed.containerd.tasks().get("vm") != "RUNNING", bed.patience)
            bed.containerd.ctr("task", "delete", "--force", "vm", status=None)
            bed.nothing_half_made()
            console.unlink()
            bed.containerd.ctr("task", "start", "-d", "--log-uri", f"file://{console}", "vm")
            tally.await_counts(bed, console)
        tally.end(bed, "vm", console)

    console = tally.start(bed, image, "vm", *tally.SMALL)
    _still_works(bed, console, ref)


@case(guests=("native",), containerds=("containerd-2.4",), seconds=180)
def the_snapshotter_dies_while_it_unpacks_ram(bed: Bed) -> None:
    """Killed at any moment of a pull, it takes up where it was, and what is removed is gone."""
    image, before = tally.image_with_ram(bed)
    pull = bed.containerd.argv("images", "pull", "--plain-http", "--snapshotter", "ovms", image)
    for delay in _DELAYS:
        for name in bed.image_names():
            bed.containerd.ctr("images", "rm", "--sync", name)
        with _session(bed, pull) as session:
            time.sleep(delay)
            bed.ovms.kill_snapshotter()
            session.wait(status=None)
        bed.ovms.start_snapshotter()
        # containerd dials again only after a pause that grows with every failure.
        process.until("containerd has found the snapshotter again",
                      lambda: process.run(pull, status=None, env=bed.ovms.env).status == 0, bed.patience)
        console = tally.start(bed, image, "vm")
        check(tally.first(console) >= before, f"it began at {tally.first(console)}")
        tally.end(bed, "vm", console)

    for name in bed.image_names():
        bed.containerd.ctr("images", "rm", "--sync", name)
    process.until("all RAM is gone", lambda: not _ram_files(bed), bed.patience)


def _ram_files(bed: Bed) -> list[str]:
    return [str(path) for path in files.below(bed.ovms.state) if "ram" in path.relative_to(bed.ovms.state).parts[:-1]]


@case(guests=("native",), containerds=("containerd-2.4",), seconds=180)
def a_machine_dies_while_it_is_restored(bed: Bed) -> None:
    """Shim or VMM are killed before the guest runs: the container can be removed, and the next one is restored."""
    image, before = tally.image_with_ram(bed)
    argv = bed.containerd.argv("run", "-d", "--null-io", "--snapshotter", "ovms", "--runtime", "io.containerd.ovms.v1", image, "vm")
    for victim in ("containerd-shim-ovms-v1", "ovms-vmm"):
        for delay in (0.04, 0.06, 0.08, 0.1, 0.15):
            with _session(bed, argv) as session:
                time.sleep(delay)
                _kill(_processes(victim))
                session.wait(status=None)
            bed.containerd.ctr("task", "kill", "-s", "SIGKILL", "vm", status=None)
            process.until("it has ended", lambda: bed.containerd.tasks().get("vm") != "RUNNING", bed.patience)
            bed.containerd.ctr("task", "delete", "--force", "vm", status=None)
            bed.containerd.ctr("containers", "delete", "vm", status=None)
            process.until("no VMM is left", lambda: not _processes("ovms-vmm"), bed.patience)
            bed.nothing_half_made()

    console = tally.start(bed, image, "vm")
    check(tally.first(console) >= before, f"it began at {tally.first(console)}")
    tally.end(bed, "vm", console)
