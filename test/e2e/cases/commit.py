"""Disks of machines that run: `ctr snapshots diff` and `nerdctl commit` freeze them under the guest."""

from __future__ import annotations

from pathlib import Path

from e2e.harness import process, tally
from e2e.harness.bed import Bed
from e2e.harness.case import case, check, contains
from e2e.harness.nerdctl import Nerdctl
from e2e.harness.ovms import RUNTIME

_SECTOR = 512
#: The sector that the counting guest writes.
_COUNT = 8 * _SECTOR


def _count_of(bed: Bed, layer: Path) -> int:
    """The count on the disk that a layer holds."""
    listed = process.run(["tar", "-taf", layer]).out.split()
    check(listed == ["ovm/manifest.json", "ovm/disk.qcow2"], f"the layer holds {listed}")
    scratch = bed.dir / f"{layer.name}.d"
    scratch.mkdir()
    process.run(["tar", "-C", scratch, "-xaf", layer, "ovm/disk.qcow2"])
    process.run(["qemu-img", "check", scratch / "ovm/disk.qcow2"])
    process.run(["qemu-img", "convert", "-O", "raw", scratch / "ovm/disk.qcow2", scratch / "raw"])
    with open(scratch / "raw", "rb") as raw:
        raw.seek(_COUNT)
        return int.from_bytes(raw.read(8), "little")


@case(guests=("native",))
def diff_of_a_running_machine(bed: Bed) -> None:
    """`ctr snapshots diff` while the guest writes: the disk of one instant each time, and all of it once the machine has ended."""
    console = tally.start(bed, bed.import_vm("tally"), "vm", *tally.SMALL)
    counts = []
    for number in range(3):
        before = tally.said(console)[-1]
        layer = bed.dir / f"layer-{number}.tar.gz"
        bed.containerd.snapshot_diff(layer, "vm")
        after = tally.await_counts(bed, console)
        counts.append(_count_of(bed, layer))
        check(before - 1 <= counts[-1] <= after, f"the disk says {counts[-1]}, the guest counted from {before} to {after}")
    bed.containerd.ctr("task", "kill", "-s", "SIGTERM", "vm")
    bed.await_state("vm", "STOPPED")
    contains(console.read_text(encoding="utf-8", errors="replace"), "all good at", "the console")
    bed.containerd.delete_task("vm")

    layer = bed.dir / "last.tar.gz"
    bed.containerd.snapshot_diff(layer, "vm")

    last = _count_of(bed, layer)
    check(last >= counts[-1] and abs(last - tally.said(console)[-1]) <= 1, f"the disk says {last} after {counts}")
    # It goes on with the same disk, tops and all.
    console.unlink()
    bed.containerd.ctr("task", "start", "-d", "--log-uri", f"file://{console}", "vm")
    tally.await_counts(bed, console)
    check(tally.first(console) == 0, "a machine that was started again did not boot")
    tally.end(bed, "vm", console)


@case(guests=("native",))
def nerdctl_commits_a_running_machine(bed: Bed) -> None:
    """`nerdctl commit` of a running machine gives an image that runs, and the machine goes on."""
    nerdctl = Nerdctl(bed)
    flags = ("--net", "none", "--runtime", RUNTIME, "--annotation", "io.ovms.memory=64M")
    nerdctl("run", "-d", "--name", "vm", *flags, bed.import_vm("tally"))

    def said() -> list[int]:
        return tally.counts(nerdctl("logs", "vm").text)

    process.until("the guest counts", lambda: len(said()) > 3, bed.patience * 2)

    nerdctl("commit", "vm", "localhost/committed:1")

    before = len(said())
    process.until("it goes on", lambda: len(said()) > before, bed.patience * 2)
    nerdctl("stop", "vm")
    contains(nerdctl("logs", "vm").text, "all good at", "the log")
    again = nerdctl("run", "--rm", *flags, "--annotation", "io.ovms.kernel-args=count=3", "localhost/committed:1")
    check(tally.counts(again.text) == [0, 1, 2, 3], f"the committed machine said {again.text[-300:]!r}")
    nerdctl("rm", "vm")
