"""RAM of images between pull and run: unpacked ahead, shared, on tmpfs or locked where the image asks, and gone with the last user."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from e2e.harness import files, process, tally
from e2e.harness.bed import Bed
from e2e.harness.case import case, check


def _gone(bed: Bed, *images: str) -> None:
    """Removes images, and waits until nothing of their RAM is left."""
    bed.containerd.ctr("images", "rm", "--sync", *images)
    process.until("RAM is removed", lambda: not tally.unpacked(bed), bed.patience)
    shared = bed.ovms.runtime / "ram"
    left = [path for path in files.below(shared) if path.parent != shared] + list((bed.ovms.state / "tmp").iterdir())
    check(not left, f"left: {left}")


@case(guests=("native",))
def unpacked_beside_the_pull(bed: Bed) -> None:
    """The memory lies ready before the first run, is the same file for two machines, and goes with the image."""
    image, before = tally.image_with_ram(bed)

    tally.await_ram(bed)

    made = [(path, path.stat().st_ino) for path in tally.unpacked(bed)]
    check(len(made) == 1, f"unpacked: {made}")
    check(made[0][0].stat().st_blocks * 512 < made[0][0].stat().st_size, "the memory file is not sparse")
    for name in ("one", "two"):
        console = tally.start(bed, image, name)
        check(tally.first(console) >= before, f"{name} began at {tally.first(console)}, not after {before}")
    check([(path, path.stat().st_ino) for path in tally.unpacked(bed)] == made, "it was unpacked again")
    for name in ("one", "two"):
        tally.end(bed, name, bed.dir / f"{name}.console")
    _gone(bed, *bed.image_names())


@case(guests=("native",))
def a_machine_that_has_written_boots(bed: Bed) -> None:
    """A container that is started again does not resume onto a disk that has moved on."""
    image, before = tally.image_with_ram(bed)
    console = tally.start(bed, image, "vm")
    check(tally.first(console) >= before, f"it began at {tally.first(console)}")
    bed.containerd.ctr("task", "kill", "-s", "SIGKILL", "vm")
    bed.await_state("vm", "STOPPED")
    bed.containerd.delete_task("vm", 137)
    console.unlink()

    bed.containerd.ctr("task", "start", "-d", "--log-uri", f"file://{console}", "vm")

    tally.await_counts(bed, console)
    check(tally.first(console) == 0, f"it began at {tally.first(console)}")
    tally.end(bed, "vm", console)


@case(guests=("native",), containerds=("containerd-2.4",))
def killed_daemon_unpacks_again(bed: Bed) -> None:
    """A snapshotter that is killed at the pull's end leaves nothing half-made, and its successor finishes the work."""
    image, before = tally.image_with_ram(bed)
    tally.await_ram(bed)
    bed.containerd.ctr("images", "rm", "--sync", image)
    process.until("RAM is removed", lambda: not tally.unpacked(bed), bed.patience)

    tally.pull(bed, image)
    bed.ovms.kill_snapshotter()
    bed.ovms.start_snapshotter()

    tally.await_ram(bed)
    check(not list((bed.ovms.state / "ram").glob(".*")), "something half-made is left")
    console = tally.start(bed, image, "vm")
    check(tally.first(console) >= before, f"it began at {tally.first(console)}")
    tally.end(bed, "vm", console)


@case(guests=("native",), containerds=("containerd-2.4",))
def on_tmpfs_and_locked(bed: Bed) -> None:
    """`ovm snapshot --preload --mlock`: machines map a file on tmpfs, which the snapshotter keeps locked while one of them is there."""
    shared = Path(tempfile.mkdtemp(prefix=bed.namespace, dir="/dev/shm"))
    bed.later(lambda: shutil.rmtree(shared, ignore_errors=True))
    bed.ovms.runtime.mkdir(exist_ok=True)
    (bed.ovms.runtime / "ram").symlink_to(shared)
    base = tally.pull(bed, bed.registry.push(bed.guests.layout("tally"), "tally:1", "--preserve-digests"))
    console = tally.start(bed, base, "origin", *tally.SMALL)
    before = tally.await_counts(bed, console)
    ref = bed.registry.ref("ram:1")
    tally.snapshot(bed, "origin", ref, "--preload", "--mlock")
    tally.end(bed, "origin", console)
    image = tally.pull(bed, ref)

    console = tally.start(bed, image, "vm")

    check(tally.first(console) >= before, f"it began at {tally.first(console)}")
    copies = [path for path in shared.glob("*/*") if not path.name.startswith(".")]
    check(len(copies) == 1, f"on tmpfs: {copies}")
    vmms = [pid for pid, name in process.descendants().items() if "ovms-vmm" in name]
    maps = "".join(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8") for pid in vmms)
    check(str(copies[0]) in maps, "the machine does not map the copy on tmpfs")
    locked, data = _locked(bed), copies[0].stat().st_blocks * 512
    check(locked >= data > 0, f"{locked} bytes are locked, the copy has {data}")
    tally.end(bed, "vm", console)
    process.until("nothing is locked", lambda: _locked(bed) == 0, bed.patience)
    _gone(bed, *bed.image_names())


def _locked(bed: Bed) -> int:
    """Bytes that the snapshotter has locked."""
    pids = [pid for pid, name in process.descendants().items() if "ovms-snapshotter" in name]
    texts = [Path(f"/proc/{pid}/status").read_text(encoding="utf-8") for pid in pids]
    return sum(int(line.split()[1]) << 10 for text in texts for line in text.splitlines() if line.startswith("VmLck:"))
