"""Tells a fault of the emulated host from a failed check.

QEMU's emulation of SVM and of code that is patched under running processors is not sound: now and then it kills the
host's kernel or a guest's, whatever runs there (test/README.md has the counts). Only what bears its marks may be tried
again on a fresh host; whatever else a check finds is ours.
"""

from __future__ import annotations

import re
from pathlib import Path

#: How the reason of a case begins that failed by the emulator's fault.
MARK = "emulator: "

_BROKEN = re.compile(r"Kernel panic|Oops|BUG: |general protection fault|stack segment|corrupted stack|kernel stack is corrupted|"
                     r"unable to handle|watchdog: |rcu_\w+ (?:self-)?detected stall|PANIC: double fault")
_TRIPLE_FAULT = re.compile(r"TripleFault|a triple fault")
#: What the test guest's init says first; a guest that came so far has booted.
_BOOTED = "ovms-guest:"


def host_complaint(console: Path) -> str:
    """The first line with which the emulated host's kernel says that it is broken; empty if it does not."""
    if not console.exists():
        return ""
    lines = console.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in lines if _BROKEN.search(line)), "")


def guest_died_at_boot(reasons: list[str], logs: Path) -> bool:
    """Whether a guest of a failed case met a triple fault, and none has said a word of its own before.

    No test guest here does that on purpose. One that had booted, or was restored, is not excused.
    """
    told = [*reasons, *(_text(path) for path in sorted(logs.glob("*")))]
    return any(_TRIPLE_FAULT.search(text) for text in told) and not any(_BOOTED in text for text in told)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
