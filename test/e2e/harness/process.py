"""Commands and daemons of a case."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .case import CaseFailed, tail

_PR_SET_CHILD_SUBREAPER = 36

#: Children that somebody here waits for; every other child of this process is an orphan for `_reap_orphans`.
_awaited: dict[int, subprocess.Popen[Any]] = {}
_spawning = threading.Lock()


def spawn(argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Starts a child that the caller will wait for."""
    with _spawning:
        child = subprocess.Popen(argv, **options)
        _awaited[child.pid] = child
    return child


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    argv: list[str]
    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both streams."""
        return self.out + self.err


def run(
    argv: Sequence[str | Path],
    *,
    status: int | None = 0,
    timeout: float = 60,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Done:
    """Runs a command; fails the case unless it exits with `status` (None: any) within `timeout` seconds."""
    words = [str(word) for word in argv]
    child = spawn(
        words, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=None if env is None else os.environ | env, cwd=cwd,
        text=True, encoding="utf-8", errors="replace",
    )
    try:
        out, err = child.communicate(stdin, timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        raise CaseFailed(f"`{shown(words)}` did not end in {timeout:.0f} s; it said: {tail(out + err)!r}") from None
    except BaseException:
        child.kill()
        child.wait()
        raise
    done = Done(words, child.returncode, out, _without_noise(err))
    if status is not None and done.status != status:
        raise CaseFailed(f"`{shown(words)}` gave {done.status}, not {status}: {tail(done.text)!r}")
    return done


def _without_noise(text: str) -> str:
    """Drops the lines by which containerd deplores this host's cgroups at every call."""
    return "".join(line for line in text.splitlines(keepends=True) if "DEPRECATION" not in line)


def shown(words: Sequence[str]) -> str:
    """A command as one would type it: programs without their directory, ctr without what every call of it has."""
    short = [os.path.basename(words[0]), *words[1:]]
    if short[1:2] == ["--address"] and short[3:4] == ["--namespace"]:
        del short[1:5]
    return " ".join(short)


def until(what: str, holds: Callable[[], object], timeout: float, step: float = 0.02) -> None:
    """Waits until `holds()` is true; fails the case with `what` if it never is."""
    deadline = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > deadline:
            raise CaseFailed(f"waited {timeout:.0f} s in vain until {what}")
        time.sleep(step)


class Daemon:
    """A program that runs beside the case, its output in a log file."""

    def __init__(self, name: str, argv: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        with open(log, "ab") as out:
            self._child = spawn(
                [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env=os.environ | (env or {}), start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._child.poll() is None

    def await_ready(self, ready: Callable[[], object], timeout: float) -> None:
        """Waits until `ready()`; fails the case with the end of the log if the daemon ends first."""
        def settled() -> bool:
            if not self.alive():
                raise CaseFailed(f"{self.name} ended with {self._child.returncode}: {tail(self.logged())!r}")
            return bool(ready())

        until(f"{self.name} answers", settled, timeout)

    def logged(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self, number: signal.Signals = signal.SIGTERM, patience: float = 20) -> None:
        """Ends it; one that does not heed the signal is killed and fails the case."""
        if not self.alive():
            return
        self._child.send_signal(number)
        try:
            self._child.wait(patience)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            raise CaseFailed(f"{self.name} did not end within {patience:.0f} s of {number.name}") from None


def become_subreaper() -> None:
    """Makes orphans of this process's descendants its children, so that none can slip away unseen."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")
    threading.Thread(target=_reap_orphans, daemon=True).start()


def heed_sigterm() -> None:
    """Makes SIGTERM do what an interrupt does, so that it cleans up as well."""
    signal.signal(signal.SIGTERM, lambda _number, _frame: os.kill(os.getpid(), signal.SIGINT))


def _reap_orphans() -> None:
    """Does for orphans what PID 1 does elsewhere: collects them as soon as they end."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while True:
        with _spawning:
            for pid in map(int, children.read_text(encoding="ascii").split()):
                # A child that was waited for has left its number to others.
                if pid not in _awaited or _awaited[pid].returncode is not None:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def descendants() -> dict[int, str]:
    """Live processes below this one: pid → command line."""
    children: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if fields[0] == "Z":
                continue
            pid = int(entry.name)
            children.setdefault(int(fields[1]), []).append(pid)
            raw = (entry / "cmdline").read_bytes().rstrip(b"\0")
            names[pid] = raw.replace(b"\0", b" ").decode(errors="replace")
    found: dict[int, str] = {}
    queue = list(children.get(os.getpid(), []))
    while queue:
        pid = queue.pop()
        found[pid] = names.get(pid, "?")
        queue += children.get(pid, [])
    return found
