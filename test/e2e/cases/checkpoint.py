"""RAM snapshots by containerd's own means: `ctr task checkpoint`, `ctr containers checkpoint` and `restore`."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

from e2e.harness import process, tally
from e2e.harness.bed import Bed
from e2e.harness.case import case, check, contains
from e2e.harness.terminal import Session

_IMAGE = "localhost/checkpoint:1"


def _origin(bed: Bed, *flags: str) -> Path:
    return tally.start(bed, bed.import_vm("tally"), "vm", *tally.SMALL, *flags)


def _restore(bed: Bed, name: str, *flags: str) -> None:
    bed.containerd.ctr("containers", "restore", "--live", *flags, name, _IMAGE)


def _follow(bed: Bed, name: str) -> Session:
    """`ctr containers restore` leaves the console's fifos to whoever attaches."""
    argv = bed.containerd.argv("task", "attach", name)
    return Session(argv, bed.ovms.env, tty=False, patience=bed.patience * 2)


def _goes_on(bed: Bed, name: str, after: int) -> int:
    """Checks that a restored machine counts on from `after` and is whole; returns its first count."""
    with _follow(bed, name) as session:
        session.expect(r"count \d+\r?\n(.|\n)*count \d+\r?\n")
        first = tally.counts(session.text)[0]
        check(first > after, f"{name} began at {first} though its origin had counted to {after}")
        bed.containerd.ctr("task", "kill", "-s", "SIGTERM", name)
        session.expect("all good at")
        session.wait(status=None)
    return first


def _restored(bed: Bed, *flags: str) -> None:
    console = _origin(bed)
    before = tally.await_counts(bed, console)
    checkpoint = ("containers", "checkpoint", "--task", "--rw", "--image") if "--rw" in flags else ("containers", "checkpoint", "--task")
    bed.containerd.ctr(*checkpoint, "vm", _IMAGE)
    tally.await_counts(bed, console)
    tally.end(bed, "vm", console)

    for name in ("one", "two"):
        _restore(bed, name, *flags)

    firsts = [_goes_on(bed, name, before) for name in ("one", "two")]
    check(firsts[0] == firsts[1], f"they went on from different counts: {firsts}")


@case(guests=("native",))
def restore_live(bed: Bed) -> None:
    """`ctr containers checkpoint --task`, then `restore --live`: twice from the same count, memory and disk of one instant."""
    _restored(bed)


@case(guests=("native",))
def restore_live_with_its_disk(bed: Bed) -> None:
    """The same with `--rw`: containerd carries the disk along too."""
    _restored(bed, "--rw")


@case(guests=("native",))
def a_clone_is_checkpointed_whole(bed: Bed) -> None:
    """A machine that was itself resumed is saved with all of its memory, and restored from that alone."""
    image, _ = tally.image_with_ram(bed)
    console = tally.start(bed, image, "vm")
    before = tally.await_counts(bed, console)
    bed.containerd.ctr("containers", "checkpoint", "--task", "vm", _IMAGE)
    tally.end(bed, "vm", console)

    _restore(bed, "one")

    _goes_on(bed, "one", before)


@case(guests=("native",))
def task_checkpoint_makes_an_image(bed: Bed) -> None:
    """`ctr task checkpoint` stores an image, and the machine goes on."""
    console = _origin(bed)

    done = bed.containerd.ctr("task", "checkpoint", "vm")

    contains(done.out, "containerd.io/checkpoint/vm:", "ctr task checkpoint")
    check(bed.containerd.tasks() == {"vm": "RUNNING"}, f"tasks: {bed.containerd.tasks()}")
    tally.await_counts(bed, console)
    tally.end(bed, "vm", console)


@case(guests=("native",), containerds=("containerd-2.4",))
def task_checkpoint_into_a_directory(bed: Bed) -> None:
    """`--image-path`: blob, disk and record are in the directory, compressed."""
    console = _origin(bed)
    directory = bed.dir / "saved"

    bed.containerd.ctr("task", "checkpoint", "--image-path", directory, "vm")

    names = sorted(path.name for path in directory.iterdir())
    check(names == ["disk.qcow2", "ram", "snapshot.json"], f"the directory holds {names}")
    size = (directory / "ram").stat().st_size
    check(size < 16 << 20, f"the blob has {size} bytes")
    record = json.loads((directory / "snapshot.json").read_text(encoding="utf-8"))
    check(record["ram"]["size"] == size and not record["ram"]["parents"], f"the record says {record['ram']}")
    process.run(["qemu-img", "check", directory / "disk.qcow2"])
    bed.refused(lambda: bed.containerd.ctr("task", "checkpoint", "--image-path", directory, "vm", status=None), "not empty")
    tally.await_counts(bed, console)
    tally.end(bed, "vm", console)


@case(guests=("native",), containerds=("containerd-2.4",))
def task_checkpoint_with_exit(bed: Bed) -> None:
    """`--exit` ends the machine once it is saved, with TaskCheckpointed before TaskExit."""
    _origin(bed)
    directory = bed.dir / "saved"

    with Session(bed.containerd.argv("events"), bed.ovms.env, tty=False, patience=bed.patience) as events:
        time.sleep(bed.patience / 30)
        bed.containerd.ctr("task", "checkpoint", "--exit", "--image-path", directory, "vm")
        events.expect("/tasks/exit")
        topics = re.findall(r"/tasks/(checkpointed|exit)", events.text)

    check(topics == ["checkpointed", "exit"], f"the events were {topics}")
    check((directory / "snapshot.json").exists(), "there is no record of the snapshot")
    bed.await_state("vm", "STOPPED")
    bed.containerd.delete_task("vm", 137)
    bed.containerd.ctr("containers", "delete", "vm")
    bed.nothing_half_made()


@case(guests=("native",))
def a_paused_machine_is_checkpointed(bed: Bed) -> None:
    """A task that the user had paused is saved and stays paused."""
    console = _origin(bed)
    bed.containerd.ctr("task", "pause", "vm")

    bed.containerd.ctr("task", "checkpoint", "vm")

    check(bed.containerd.tasks() == {"vm": "PAUSED"}, f"tasks: {bed.containerd.tasks()}")
    bed.containerd.ctr("task", "resume", "vm")
    tally.await_counts(bed, console)
    tally.end(bed, "vm", console)


@case(guests=("native",), containerds=("containerd-2.4",))
def checkpoint_on_a_full_disk(bed: Bed) -> None:
    """When the directory's file system is full, the machine goes on and the directory is empty."""
    small = bed.dir / "small"
    small.mkdir()
    process.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small])
    bed.later(lambda: process.run(["umount", "-l", small]) and None)
    console = _origin(bed)
    os.mkdir(small / "saved")

    bed.refused(lambda: bed.containerd.ctr("task", "checkpoint", "--image-path", small / "saved", "vm", status=None), "No space left")

    left = list((small / "saved").iterdir())
    check(not left, f"this was left in the directory: {left}")
    check(bed.containerd.tasks() == {"vm": "RUNNING"}, f"tasks: {bed.containerd.tasks()}")
    tally.await_counts(bed, console)
    tally.end(bed, "vm", console)


@case(guests=("native",))
def the_events_of_a_restore(bed: Bed) -> None:
    """A restored machine's life is told like a booted one's."""
    console = _origin(bed)
    bed.containerd.ctr("containers", "checkpoint", "--task", "vm", _IMAGE)
    tally.end(bed, "vm", console)

    with Session(bed.containerd.argv("events"), bed.ovms.env, tty=False, patience=bed.patience) as events:
        time.sleep(bed.patience / 30)
        _restore(bed, "one")
        _goes_on(bed, "one", 0)
        # Whoever attaches deletes the task in the end.
        events.expect("/tasks/delete")
        topics = re.findall(r"/tasks/(create|start|exit|delete)", events.text)
        contains(events.text, '"checkpoint":"', "the event of the creation")

    check(topics == ["create", "start", "exit", "delete"], f"the events were {topics}")


@case(guests=("native",))
def a_checkpoint_of_something_else_is_refused(bed: Bed) -> None:
    """A checkpoint image whose archive is no snapshot of ours makes no machine."""
    console = _origin(bed)
    bed.containerd.ctr("containers", "checkpoint", "--rw", "vm", _IMAGE)
    tally.end(bed, "vm", console)

    bed.refused(lambda: bed.containerd.ctr("containers", "restore", "--live", "one", _IMAGE, status=None))
