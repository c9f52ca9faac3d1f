"""Ordinary images: with stock containerd and runc beside ovms, and through our snapshotter."""

from __future__ import annotations

from e2e.harness import files, oci, process
from e2e.harness.bed import Bed
from e2e.harness.case import case, check, contains

from . import pull as pulling

_BUSYBOX = "localhost/busybox:1"
_PAUSE = "localhost/pause:1"


@case(vm=False)
def busybox_with_overlayfs_and_runc(bed: Bed) -> None:
    """A containerd that knows nothing of ovms runs our ordinary image: the bed itself is sound."""
    bed.plain_containerd.import_layout(bed.ordinary(oci.busybox()))

    done = bed.plain_containerd.ctr("run", "--rm", _BUSYBOX, "b1", "/bin/sh", "-c", "cat /etc/layer; ls /etc")

    contains(done.out, "second", "the container's output")
    check("gone" not in done.out, f"a deleted file is there: {done.out}")


@case(vm=False, guests=("native",))
def exit_status_of_runc_is_passed_on(bed: Bed) -> None:
    """`ctr run` exits as the container did."""
    bed.plain_containerd.import_layout(bed.ordinary(oci.busybox()))

    bed.plain_containerd.ctr("run", "--rm", _BUSYBOX, "b1", "/bin/sh", "-c", "exit 7", status=7)


@case(vm=False)
def busybox_through_our_snapshotter_with_runc(bed: Bed) -> None:
    """Our snapshotter and differ serve an ordinary image: overrides, whiteouts and writes are as with overlayfs."""
    bed.containerd.import_layout(bed.ordinary(oci.busybox()), "--snapshotter", "ovms")

    done = bed.containerd.ctr(
        "run", "--rm", "--snapshotter", "ovms", _BUSYBOX, "b1", "/bin/sh", "-c",
        "cat /etc/layer; ls /etc; echo mine > /etc/layer; cat /etc/layer",
    )

    contains(done.out, "second", "the container's output")
    contains(done.out, "mine", "the container's output")
    check("gone" not in done.out, f"a deleted file is there: {done.out}")


@case(vm=False, guests=("native",))
def writes_of_two_ordinary_containers_are_apart(bed: Bed) -> None:
    """Two containers of one image through our snapshotter do not see each other's writes."""
    bed.containerd.import_layout(bed.ordinary(oci.busybox()), "--snapshotter", "ovms")

    bed.containerd.ctr("run", "--snapshotter", "ovms", _BUSYBOX, "b1", "/bin/sh", "-c", "echo one > /etc/mark")
    done = bed.containerd.ctr("run", "--rm", "--snapshotter", "ovms", _BUSYBOX, "b2", "/bin/ls", "/etc")

    check("mark" not in done.out, f"the second container sees the first one's file: {done.out}")


@case(vm=False)
def pause_through_our_snapshotter_with_runc(bed: Bed) -> None:
    """The image that every Kubernetes pod starts with runs through our snapshotter and is killed as usual."""
    bed.containerd.import_layout(bed.ordinary(oci.pause()), "--snapshotter", "ovms")

    bed.containerd.ctr("run", "-d", "--null-io", "--snapshotter", "ovms", _PAUSE, "p1")
    check(bed.containerd.tasks() == {"p1": "RUNNING"}, f"tasks: {bed.containerd.tasks()}")
    bed.containerd.ctr("task", "kill", "-s", "SIGKILL", "p1")
    process.until("the pause container has stopped", lambda: bed.containerd.tasks() == {"p1": "STOPPED"}, bed.patience)

    bed.containerd.delete_task("p1", 137)


@case(vm=False, guests=("native",))
def ordinary_pull_through_our_snapshotter(bed: Bed) -> None:
    """An ordinary image pulled from a registry is unpacked by our snapshotter and differ."""
    ref = bed.registry.push(bed.ordinary(oci.busybox()), "busybox:1")

    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref)

    done = bed.containerd.ctr("run", "--rm", "--snapshotter", "ovms", ref, "b1", "/bin/cat", "/etc/layer")
    contains(done.out, "second", "the container's output")


@case(vm=False, containerds=("containerd-2.4",), guests=("native",))
def overlayfs_pull_while_our_daemon_is_stopped(bed: Bed) -> None:
    """With ovms configured but its daemon dead, other snapshotters go on pulling and running."""
    ref = bed.registry.push(bed.ordinary(oci.busybox()), "busybox:1")
    _ = bed.containerd
    bed.ovms.stop_snapshotter()

    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", ref)

    done = bed.containerd.ctr("run", "--rm", "--snapshotter", "overlayfs", ref, "b1", "/bin/cat", "/etc/layer")
    contains(done.out, "second", "the container's output")


@case(vm=False, containerds=("containerd-1.7",), guests=("native",))
def overlayfs_pull_while_our_daemon_is_stopped_on_1_7(bed: Bed) -> None:
    """1.7 unpacks everything with the first differ of its list: while our daemon is dead it says which socket it misses and
    leaves nothing. Without ovms-diff in the list it needs no daemon of ours."""
    ref = bed.registry.push(bed.ordinary(oci.busybox()), "busybox:1")
    pull = ("images", "pull", "--plain-http", "--snapshotter", "overlayfs", ref)
    _ = bed.containerd
    bed.ovms.stop_snapshotter()

    bed.failed(bed.containerd.ctr(*pull, status=None), f"dial unix://{bed.ovms.socket}")

    left = bed.containerd.ctr("snapshots", "--snapshotter", "overlayfs", "ls").out.splitlines()[1:]
    check(not left, f"snapshots are left: {left}")
    without = bed.start_containerd("w", pulling.without_our_differ(bed.ovms.snippet(bed.release)))
    without.ctr(*pull)
    contains(without.ctr("run", "--rm", ref, "b1", "/bin/cat", "/etc/layer").out, "second", "the container's output")
    bed.ovms.start_snapshotter()
    # containerd dials again only after a pause.
    process.until("containerd has found our daemon again", lambda: bed.containerd.ctr(*pull, status=None).status == 0, bed.patience)
    done = bed.containerd.ctr("run", "--rm", "--snapshotter", "overlayfs", ref, "b1", "/bin/cat", "/etc/layer")
    contains(done.out, "second", "the container's output")


@case(vm=False)
def overlayfs_pull_starts_our_stopped_daemon_by_its_socket(bed: Bed) -> None:
    """In the installed form, socket activation, a stopped daemon starts at the first dial: nothing on the host breaks."""
    ref = bed.registry.push(bed.ordinary(oci.busybox()), "busybox:1")
    bed.ovms.start_snapshotter_by_socket()

    containerd = bed.start_containerd("c", bed.ovms.snippet(bed.release))
    containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", ref)
    containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref)

    for snapshotter in ("overlayfs", "ovms"):
        done = containerd.ctr("run", "--rm", "--snapshotter", snapshotter, ref, f"b-{snapshotter}", "/bin/cat", "/etc/layer")
        contains(done.out, "second", f"the output with {snapshotter}")


@case(vm=False)
def snapshotter_survives_being_killed(bed: Bed) -> None:
    """After SIGKILL the snapshotter comes back with every snapshot it had."""
    bed.containerd.import_layout(bed.ordinary(oci.busybox()), "--snapshotter", "ovms")
    before = bed.containerd.ctr("snapshots", "--snapshotter", "ovms", "ls").out

    bed.ovms.kill_snapshotter()
    bed.ovms.start_snapshotter()

    process.until("the snapshotter answers containerd again", lambda: bed.containerd.ctr(
        "snapshots", "--snapshotter", "ovms", "ls", status=None).out == before, bed.patience)
    done = bed.containerd.ctr("run", "--rm", "--snapshotter", "ovms", _BUSYBOX, "b1", "/bin/cat", "/etc/layer")
    contains(done.out, "second", "the container's output")


@case(vm=False, guests=("native",))
def removed_images_leave_no_snapshots(bed: Bed) -> None:
    """Once an image is removed, garbage collection empties our store too."""
    bed.containerd.import_layout(bed.ordinary(oci.busybox()), "--snapshotter", "ovms")
    store = bed.ovms.state

    bed.containerd.ctr("images", "rm", "--sync", _BUSYBOX)

    process.until("no snapshot is left", lambda: len(
        bed.containerd.ctr("snapshots", "--snapshotter", "ovms", "ls").out.splitlines()) == 1, bed.patience)
    process.until("the layers' files are gone", lambda: not [path for path in files.below(store) if path.match("bin/busybox")],
                  bed.patience)
