"""Killing processes at a step of their work, told by what the work leaves on disk, and not by a clock."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import process
from .case import CaseFailed, check

#: How often a step is tried: on a busy machine a step may be over before the signal arrives.
_ATTEMPTS = 8


@dataclass(frozen=True)
class Step:
    """One step of some work: from the moment that `begun` is true to the moment that `over` is."""

    name: str
    begun: Callable[[], object]
    over: Callable[[], object]


def kill(pids: Iterable[int]) -> None:
    """SIGKILL; who is gone already does not matter."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_within(step: Step, victims: Callable[[], Iterable[int]], runs: Callable[[], object], patience: float) -> bool:
    """Kills the victims as soon as the step has begun, and waits for their end. Says whether it was not over when they were killed.

    `runs` says whether the work goes on: when it has ended without having been seen in that step, the answer is no.
    """
    deadline = time.monotonic() + patience
    while not step.begun():
        if not runs():
            return False
        check(time.monotonic() < deadline, f"the step {step.name!r} never began")
    kill(pids := list(victims()))
    over = step.over()
    process.until("the victims are gone", lambda: not any(_alive(pid) for pid in pids), patience, step=0.001)
    return bool(pids) and not over


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until_hit(step: Step, attempt: Callable[[], bool]) -> None:
    """Tries until a kill has met the step; an attempt does the whole work, kills, and checks what came of it."""
    for _ in range(_ATTEMPTS):
        if attempt():
            return
    raise CaseFailed(f"none of {_ATTEMPTS} kills met the step {step.name!r}")
