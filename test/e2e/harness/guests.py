"""Guest images by what they do, so that one case runs with bare-metal guests and with a stock Debian alike."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from testbed import guest

from . import process
from .case import CaseFailed, CaseSkipped
from .ovms import REPO, program

_ELF = REPO / "target/guests"
#: Bytes of the bare-metal guests' disk.
_DISK = 4 << 20
_CLUSTER = 64 << 10

BASE_LINE = guest.BASE_LINE
DIFF_LINE = guest.DIFF_LINE


@dataclass(frozen=True)
class Kind:
    """What one kind of guest does under a name, and what it prints meanwhile."""

    #: Name of the ELF file, or the value of ovms.test.
    program: str
    #: Kernel arguments of its own.
    args: str = ""
    #: What it prints when it has come to do its work.
    ready: str = ""


#: The same behaviour of both kinds of guest. A name missing on one side is not to be had there.
NATIVE = {
    "poweroff": Kind("hello", ready="hello from the guest"),
    "wait": Kind("spin", "quiet=1", "tick 0"),
    "ticks": Kind("spin", ready="tick 0"),
    "talk": Kind("echo", ready="echo ready"),
    "reset": Kind("reboot", ready="reset"),
    "panic": Kind("panic", ready="panic"),
    "triple": Kind("triple", ready="triple fault"),
    "disk": Kind("disk", ready="sector 0:"),
    "cpus": Kind("smp", ready="cpus"),
    "memory": Kind("memtop", ready="ram"),
    "tally": Kind("tally", "fill=16", "count "),
    # The same with so much memory that a snapshot of it and its unpacking take a while.
    "bulk": Kind("tally", "fill=192", "count "),
}
STOCK = {
    "poweroff": Kind("poweroff", ready="ovms-guest: powering off"),
    "wait": Kind("wait", ready="ovms-guest: ready"),
    "ticks": Kind("counter", ready="tick 0"),
    "talk": Kind("shell", ready="ovms-guest: shell on the console"),
    "reset": Kind("reboot", ready="ovms-guest: resetting"),
    "panic": Kind("panic", ready="ovms-guest: crashing"),
    "disk": Kind("poweroff", ready="ovms-guest: powering off"),
    "write": Kind("disk-write", ready="ovms-guest: ready"),
    "cpus": Kind("poweroff", ready="ovms-guest: cpus"),
    "memory": Kind("poweroff", ready="ovms-guest: memory"),
    "fill": Kind("memory", ready="filling memory"),
    "tally": Kind("tally", ready="ovms-guest: tally 2 "),
}


@dataclass(frozen=True)
class Parts:
    """The files of an image, as `ovm build` takes them."""

    kernel: Path
    initrd: Path | None
    disks: tuple[Path, ...]
    args: str

    def flags(self) -> list[str]:
        """The flags of `ovm build` for these."""
        flags = ["--kernel", str(self.kernel)]
        if self.initrd:
            flags += ["--initrd", str(self.initrd)]
        for disk in self.disks:
            flags += ["--disk", str(disk)]
        return [*flags, "--args", self.args]


class Guests:
    """The images of one kind of guest, each built once a run."""

    def __init__(self, kind: str, scratch: str) -> None:
        self.native = kind == "native"
        self._kinds = NATIVE if self.native else STOCK
        self._dir = Path(tempfile.mkdtemp(prefix="oe-images", dir=scratch))

    def close(self) -> None:
        """Removes what was built."""
        shutil.rmtree(self._dir, ignore_errors=True)

    def ready(self, behaviour: str) -> str:
        """What a guest prints when it has come to do its work."""
        return self._kind(behaviour).ready

    def _kind(self, behaviour: str) -> Kind:
        if behaviour not in self._kinds:
            raise CaseSkipped(f"no {'bare-metal' if self.native else 'Debian'} guest does {behaviour!r}")
        return self._kinds[behaviour]

    def parts(self, behaviour: str) -> Parts:
        """The files of an image."""
        kind = self._kind(behaviour)
        if not self.native:
            stock = guest.guest()
            return Parts(stock.kernel, stock.initrd, (stock.base, stock.diff), f"{stock.args} ovms.test={kind.program}".strip())
        kernel = _ELF / f"{kind.program}.elf"
        if not kernel.exists():
            raise CaseFailed(f"{kernel} is missing: run `make guests`")
        return Parts(kernel, None, self.disks, kind.args or "bare")

    @cached_property
    def disks(self) -> tuple[Path, Path]:
        """Base and diff of the bare-metal guests: sector 0 tells them apart."""
        base, changed = self._dir / "base.raw", self._dir / "changed.raw"
        filler = bytes(range(1, 256)) * (_DISK // 255 + 1)
        contents = bytearray(filler[:_DISK])
        for image, line in ((base, BASE_LINE), (changed, DIFF_LINE)):
            contents[:512] = line.encode().ljust(512, b"\0")
            image.write_bytes(contents)
        guest.diff_qcow2(base, changed, self._dir / "diff.qcow2")
        process.run(["qemu-img", "convert", "-O", "qcow2", base, self._dir / "base.qcow2"])
        base.unlink()
        changed.unlink()
        return self._dir / "base.qcow2", self._dir / "diff.qcow2"

    def layout(self, behaviour: str, *, extra_args: str = "", name: str = "") -> Path:
        """The image as an OCI layout directory made by `ovm build`."""
        name = name or behaviour
        layout = self._dir / f"layout-{name}"
        if not layout.exists():
            self.build(behaviour, layout, extra_args=extra_args, name=name)
        return layout

    def build(self, behaviour: str, out: Path, *, extra_args: str = "", name: str = "", flags: tuple[str, ...] = ()) -> None:
        """Runs `ovm build`."""
        parts = self.parts(behaviour)
        parts = Parts(parts.kernel, parts.initrd, parts.disks, f"{parts.args} {extra_args}".strip())
        process.run(
            [program("ovm"), "build", *parts.flags(), "--name", name or behaviour, "--version", "1",
             "--tag", f"localhost/{name or behaviour}:1", *flags, "-o", out],
            timeout=300,
        )
