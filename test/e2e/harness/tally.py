"""The bare-metal guest that counts in memory and on disk: what it said, and whether it is whole."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from . import process
from .bed import Bed
from .case import check, contains
from .terminal import Session

#: Little memory, so that many fit.
SMALL = ("--annotation", "io.ovms.memory=64M")


def counts(text: str) -> list[int]:
    """What it counted, from whole lines: a machine that goes on from a snapshot may begin in the middle of one."""
    return [int(count) for count in re.findall(r"^count (\d+)\r?\n", text, re.MULTILINE)]


def said(console: Path) -> list[int]:
    """The same from a console that goes to a file."""
    return counts(console.read_text(encoding="utf-8", errors="replace")) if console.exists() else []


def start(bed: Bed, image: str, name: str, *flags: str) -> Path:
    """Starts a detached machine of the image; returns its console once it has counted twice."""
    console = bed.dir / f"{name}.console"
    # Loggers append, and an earlier machine of that name may have counted into it.
    console.unlink(missing_ok=True)
    bed.vm(image, name, "-d", "--log-uri", f"file://{console}", *flags)
    await_counts(bed, console)
    return console


def await_counts(bed: Bed, console: Path, more: int = 2) -> int:
    """Waits until it has counted on; returns its last count."""
    before = len(said(console))
    try:
        process.until(f"{console.stem} counts", lambda: len(said(console)) >= before + more, bed.patience * 2)
    except Exception as failure:
        text = console.read_text(encoding="utf-8", errors="replace") if console.exists() else ""
        raise type(failure)(f"{failure}; its console: {text[-300:]!r}") from None
    return said(console)[-1]


def first(console: Path) -> int:
    """The first count on a console."""
    found = said(console)
    check(found, f"{console.stem} has not counted")
    return found[0]


def end(bed: Bed, name: str, console: Path) -> None:
    """Presses the power button; fails the case unless memory and disk are whole and of one instant."""
    bed.containerd.ctr("task", "kill", "-s", "SIGTERM", name)
    bed.await_state(name, "STOPPED")
    contains(console.read_text(encoding="utf-8", errors="replace"), "all good at", f"the console of {name}")
    bed.containerd.delete_task(name)
    bed.containerd.ctr("containers", "delete", name)


def snapshot(bed: Bed, name: str, ref: str, *flags: str, status: int | None = 0) -> process.Done:
    """`ovm snapshot` of a machine that containerd started; the reference's registry gets the image."""
    return bed.ovms.ovm("snapshot", f"{bed.namespace}/{name}", "-t", ref, *flags, status=status)


def unpacked(bed: Bed) -> list[Path]:
    """The memory files that the snapshotter has unpacked."""
    return sorted(path for path in (bed.ovms.state / "ram").glob("*/memory") if not path.parent.name.startswith("."))


def await_ram(bed: Bed) -> None:
    """Waits until RAM lies unpacked; that begins half a second after the pull."""
    process.until("RAM is unpacked", lambda: bool(unpacked(bed)), bed.patience)


def pull(bed: Bed, ref: str) -> str:
    """Pulls an image and unpacks it with our snapshotter."""
    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref)
    return ref


def image_with_ram(bed: Bed, tag: str = "ram:1", memory: str = "64M", behaviour: str = "tally") -> tuple[str, int]:
    """Makes a RAM snapshot of a counting machine and pulls it; returns the image and the count that it had passed."""
    ref = bed.registry.ref(tag)
    before = stored_with_ram(bed, ref, memory, behaviour)
    return pull(bed, ref), before


def stored_with_ram(bed: Bed, name: str, memory: str = "64M", behaviour: str = "tally") -> int:
    """Makes a RAM snapshot of a counting machine in the local store, and in the registry that its name says, if any; returns
    the count that the machine had passed."""
    bed.ovms.ovm("run", "-d", "--name", "origin", "--memory", memory, bed.guests.layout(behaviour))
    bed.later(lambda: bed.ovms.ovm("rm", "-f", "origin", status=None) and None)
    process.until("the origin counts", lambda: len(_logged(bed)) > 2, bed.patience)
    before = _logged(bed)[-1]
    bed.ovms.ovm("snapshot", "origin", "-t", name)
    bed.ovms.ovm("stop", "origin")
    contains(bed.ovms.ovm("logs", "origin").out, "all good at", "the console of the origin")
    bed.ovms.ovm("rm", "origin")
    return before


def resume(bed: Bed, image: str, *flags: str) -> int:
    """`ovm run` of an image with RAM: checks that the machine counts on and is whole; returns its first count."""
    argv = [str(bed.ovms.program("ovm")), "run", *flags, image]
    with Session(argv, bed.ovms.env, tty=False, patience=bed.patience * 2) as session:
        session.expect(r"count \d+\r?\n(.|\n)*count \d+\r?\n")
        found = counts(session.text)[0]
        session.signal(signal.SIGTERM)
        session.expect("all good at")
        session.wait()
    return found


def _logged(bed: Bed) -> list[int]:
    return counts(bed.ovms.ovm("logs", "origin").out)
