"""RAM snapshots of an unmodified Debian, by containerd and by the VMM alone."""

from __future__ import annotations

import re
import time
from pathlib import Path

from e2e.harness import process, tally
from e2e.harness.bed import Bed
from e2e.harness.case import CaseFailed, case, check, contains
from e2e.harness.ovms import REPO
from testbed import debian, guest

#: A line of the guest: count, random number, seconds since 1970.
_LINE = re.compile(r"ovms-guest: tally (\d+) random ([0-9a-f]{16}) clock (\d+) \.")
#: The VMM's own tests of a stock kernel (vmm/tests/linux.rs).
_VMM_TESTS = REPO / "target/e2e/vmm-linux"
_MEMORY = ("--memory-limit", str(192 << 20))


def _lines(console: Path) -> list[tuple[int, str, int]]:
    text = console.read_text(encoding="utf-8", errors="replace") if console.exists() else ""
    return [(int(count), random, int(clock)) for count, random, clock in _LINE.findall(text)]


def _fresh(bed: Bed) -> Bed:
    """Another containerd and snapshotter, as on another host."""
    other = Bed(bed.release, bed.guests, bed.patience, str(bed.dir))

    def close() -> None:
        if wrong := other.close():
            raise CaseFailed("; ".join(wrong))

    bed.later(close)
    return other


def _end(bed: Bed, name: str, console: Path) -> None:
    bed.containerd.ctr("task", "kill", "-s", "SIGTERM", name)
    process.until(f"{name} has ended", lambda: bed.containerd.tasks().get(name) == "STOPPED", bed.patience * 3)
    contains(console.read_text(encoding="utf-8", errors="replace"), "files are good, ext4 errors 0", f"the console of {name}")
    bed.containerd.delete_task(name)


@case(guests=("stock",), containerds=("containerd-2.4",), seconds=300)
def clones_of_a_busy_debian(bed: Bed) -> None:
    """Snapshotted under disk load, pushed, pulled by a fresh containerd and run three times: one count, clean file systems,
    right clocks, different random numbers, bases as they were."""
    base = bed.registry.push(bed.guests.layout("tally"), "debian:1", "--preserve-digests")
    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", base)
    origin = bed.detached("tally", "origin", *_MEMORY, image=base)
    ref = bed.registry.ref("debian:ram")
    before = _lines(origin)[-1][0]

    bed.ovms.ovm("snapshot", f"{bed.namespace}/origin", "-t", ref, timeout=bed.patience * 4)

    seen = len(_lines(origin))
    process.until("the origin goes on", lambda: len(_lines(origin)) > seen, bed.patience)
    _end(bed, "origin", origin)
    other = _fresh(bed)
    other.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref, timeout=bed.patience * 4)
    process.until("RAM is unpacked", lambda: bool(tally.unpacked(other)), bed.patience * 4)
    before_clones = other.hashes(ram=True)
    clones = []
    for name in ("one", "two", "three"):
        console = other.dir / f"{name}.console"
        other.vm(ref, name, "-d", "--log-uri", f"file://{console}")
        process.until(f"{name} counts", lambda console=console: len(_lines(console)) > 1, bed.patience * 2)
        now = time.time()
        clones.append(_lines(console)[:2])
        check(abs(_lines(console)[-1][2] - now) < 5, f"the clock of {name} is at {_lines(console)[-1][2]}, the host's at {now:.0f}")
        _end(other, name, console)
    counts = {first[0] for first, _ in clones}
    check(len(counts) == 1 and min(counts) > before, f"the origin was at {before}, the clones at {clones}")
    # The number of a clone's first line may have been drawn before the instant, and printed after it.
    check(len({random for _, (_, random, _) in clones}) == 3, f"clones drew the same random numbers: {clones}")
    other.unchanged(before_clones)


@case(guests=("stock",), containerds=(), seconds=240)
def a_stock_kernel_in_the_vmm_alone(bed: Bed) -> None:
    """The VMM's tests with a stock kernel: it boots; restored twice it says "virtual machine fork", has the right time and
    random numbers of its own."""
    if not _VMM_TESTS.exists():
        raise CaseFailed(f"{_VMM_TESTS} is missing: run `make suite`")
    stock, linux = guest.guest(), bed.dir / "linux"
    linux.mkdir()
    for name, path in (("vmlinuz", stock.kernel), ("initrd.img", stock.initrd), ("busybox", debian.host() / "busybox")):
        (linux / name).symlink_to(path)

    done = process.run(
        [_VMM_TESTS, "--ignored", "--test-threads=1", "--nocapture"], status=None, timeout=bed.patience * 12,
        env={"OVMS_LINUX": str(linux), "TMPDIR": str(bed.dir)},
    )

    check(done.status == 0, f"the tests failed: {done.text[-1200:]}")
    contains(done.text, "2 passed", "what the tests said")
