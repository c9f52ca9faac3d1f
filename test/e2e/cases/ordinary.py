"""Ordinary images with stock containerd and runc: what must work before and beside ovms."""

from __future__ import annotations

from e2e.harness import oci
from e2e.harness.bed import Bed
from e2e.harness.case import case, check, contains


@case(vm=False)
def busybox_with_overlayfs_and_runc(bed: Bed) -> None:
    """A containerd that knows nothing of ovms runs our ordinary image: the bed itself is sound."""
    bed.plain_containerd.import_layout(bed.ordinary(oci.busybox()))

    done = bed.plain_containerd.ctr("run", "--rm", "localhost/busybox:1", "b1", "/bin/sh", "-c", "cat /etc/layer; ls /etc")

    contains(done.out, "second", "the container's output")
    check("gone" not in done.out, f"a deleted file is there: {done.out}")


@case(vm=False)
def exit_status_of_runc_is_passed_on(bed: Bed) -> None:
    """`ctr run` exits as the container did."""
    bed.plain_containerd.import_layout(bed.ordinary(oci.busybox()))

    bed.plain_containerd.ctr("run", "--rm", "localhost/busybox:1", "b1", "/bin/sh", "-c", "exit 7", status=7)
