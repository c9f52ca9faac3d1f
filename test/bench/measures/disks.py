"""A disk of a known speed: ext4 on a loop device that the kernel holds to a rate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e.harness import process
from e2e.harness.case import CaseSkipped

#: What a rule of the whole machine is written to; cgroup v2 has none, and there only its own writers could be held.
_RULE = Path("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device")


@contextmanager
def held_disk(below: Path, mib: int, mb_per_second: int) -> Iterator[Path]:
    """A mounted file system of `mib` MiB, with its image below `below`, that takes so many MB/s."""
    if not _RULE.exists():
        raise CaseSkipped("no disk can be held to a rate: the blkio controller of cgroup v1 is not mounted")
    image, mounted = below / "held.img", below / "held"
    with image.open("wb") as file:
        file.truncate(mib << 20)
    mounted.mkdir()
    process.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", image])
    device = process.run(["losetup", "--find", "--show", "--direct-io=on", image]).out.strip()
    try:
        number = (Path("/sys/block") / Path(device).name / "dev").read_text(encoding="ascii").strip()
        process.run(["mount", device, mounted])
        try:
            _RULE.write_text(f"{number} {mb_per_second * 1_000_000}", encoding="ascii")
            yield mounted
        finally:
            _RULE.write_text(f"{number} 0", encoding="ascii")
            process.run(["umount", mounted])
    finally:
        process.run(["losetup", "--detach", device])
