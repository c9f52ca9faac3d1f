"""A command on a pseudo terminal, or on pipes, that a case talks with."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from . import process
from .case import CaseFailed, tail


class Session:
    """A running command whose output is read as it comes and whose input is written by the case."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], *, tty: bool, patience: float) -> None:
        self._shown = process.shown(argv)
        self._patience = patience
        self._seen = b""
        self._ended = False
        if tty:
            ours, theirs = pty.openpty()
            self._in = self._out = ours
        else:
            theirs_in, self._in = os.pipe()
            self._out, theirs = os.pipe()
        self._child: subprocess.Popen[bytes] = process.spawn(
            argv, stdin=theirs if tty else theirs_in, stdout=theirs, stderr=theirs, env=os.environ | dict(env),
            start_new_session=True, preexec_fn=_take_terminal if tty else None,
        )
        os.close(theirs)
        if not tty:
            os.close(theirs_in)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self._child.poll() is None:
                os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        for fd in {self._in, self._out}:
            with contextlib.suppress(OSError):
                os.close(fd)

    @property
    def text(self) -> str:
        """All output so far."""
        return self._seen.decode(errors="replace")

    def _read(self, seconds: float) -> None:
        if self._ended:
            time.sleep(min(seconds, 0.02))
            return
        if not select.select([self._out], [], [], seconds)[0]:
            return
        try:
            data = os.read(self._out, 65536)
        except OSError:
            # A pty whose other end is closed gives EIO.
            data = b""
        self._ended = not data
        self._seen += data

    def expect(self, pattern: str, timeout: float | None = None, *, after: int = 0) -> re.Match[str]:
        """Waits until the pattern is in the output behind its first `after` characters; fails the case if it never is."""
        deadline = time.monotonic() + (timeout or self._patience)
        while not (match := re.search(pattern, self.text[after:])):
            if time.monotonic() > deadline or (self._ended and not self.running()):
                raise CaseFailed(f"`{self._shown}` never said {pattern!r}; it said: {tail(self.text)!r}")
            self._read(0.1)
        return match

    @property
    def pid(self) -> int:
        """The command's process id."""
        return self._child.pid

    def running(self) -> bool:
        """Whether the command has not ended."""
        return self._child.poll() is None

    def send(self, text: str) -> None:
        """Writes to its input."""
        data = text.encode()
        while data:
            data = data[os.write(self._in, data):]

    def close_input(self) -> None:
        """Ends its input, where it is a pipe."""
        os.close(self._in)
        # The number may be somebody else's from now on.
        self._in = -1

    def resize(self, columns: int, rows: int) -> None:
        """Changes the size of its terminal, as a window that is dragged does."""
        fcntl.ioctl(self._in, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the command."""
        self._child.send_signal(number)

    def wait(self, status: int | None = 0, timeout: float | None = None) -> str:
        """Waits for its end; fails the case unless it exits with `status`. Returns all its output."""
        deadline = time.monotonic() + (timeout or self._patience)
        while self.running():
            if time.monotonic() > deadline:
                raise CaseFailed(f"`{self._shown}` did not end; it said: {tail(self.text)!r}")
            self._read(0.05)
        while not self._ended and select.select([self._out], [], [], 0.5)[0]:
            self._read(0)
        if status is not None and self._child.returncode != status:
            raise CaseFailed(f"`{self._shown}` gave {self._child.returncode}, not {status}: {tail(self.text)!r}")
        return self.text


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
