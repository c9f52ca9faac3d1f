"""`ovm build` that is killed in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from e2e.harness import process
from e2e.harness.bed import Bed
from e2e.harness.case import CaseFailed, case, check

_DISK = 192 << 20


@case(vm=False, guests=("native",), containerds=(), seconds=240)
def killed_build_leaves_nothing_that_reads_as_an_image(bed: Bed) -> None:
    """Killed while it writes a layout or a tar, it leaves none; the next build at the same place gives the same image as ever."""
    disk = bed.dir / "disk.raw"
    with open(disk, "wb") as file:
        for _ in range(_DISK >> 20):
            file.write(os.urandom(1 << 20))
    kernel = bed.guests.parts("poweroff").kernel
    flags = ["--kernel", kernel, "--disk", disk, "--name", "killed", "--version", "1", "--tag", "localhost/killed:1"]
    clean = bed.dir / "clean"
    bed.ovms.ovm("build", *flags, "-o", clean, timeout=bed.patience * 8)

    for name, stage in (("early", _begun), ("late", _half_done), ("image.tar", _half_done)):
        out = bed.dir / name
        _kill(bed, [*flags, "-o", out], lambda out=out, stage=stage: stage(out))

        check(not (out / "index.json").exists() and not out.is_file(), f"{name}: there is an image after the kill")
        bed.refused(lambda out=out: bed.ovms.ovm("validate", out, status=None))
        bed.refused(lambda out=out: bed.ovms.ovm("inspect", out, status=None))
        bed.ovms.ovm("build", *flags, "-o", out, timeout=bed.patience * 8)
        bed.ovms.ovm("validate", out, timeout=bed.patience * 8)
        if out.is_dir():
            check((out / "index.json").read_bytes() == (clean / "index.json").read_bytes(), f"{name}: another image came out")


def _kill(bed: Bed, words: list[str | Path], due: Callable[[], bool]) -> None:
    """Starts a build and kills it when it is due."""
    child = process.spawn([str(bed.ovms.program("ovm")), "build", *map(str, words)], stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + bed.patience * 2
        while not due():
            if child.poll() is not None or time.monotonic() > deadline:
                raise CaseFailed("the build was over before it could be killed")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def _unfinished(out: Path) -> int:
    """Bytes in temporary files of a build with this output."""
    found = [*out.glob("blobs/sha256/.tmp-*"), *out.parent.glob(f"*{out.name}*.tmp*"), *out.parent.glob(".tmp*")]
    size = 0
    for path in found:
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            # Renamed to its name meanwhile.
            continue
    return size


def _begun(out: Path) -> bool:
    return _unfinished(out) > 0


def _half_done(out: Path) -> bool:
    return _unfinished(out) > _DISK // 2
