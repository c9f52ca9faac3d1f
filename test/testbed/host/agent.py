"""Runs commands in the nested host for the machine outside.

One thread serves each virtio-serial port named `ovms.N`; the other end is a Unix socket of QEMU.
A request is one line of JSON: {"token", "argv", "cwd", "env", "stdin"}. The answer is the token
(so that whatever an interrupted exchange left in the pipe can be skipped) and frames of one type byte,
a big-endian u32 length and data: `o` stdout, `e` stderr, `x` the exit status as decimal text.
A caller who goes away takes the command with him.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

_FRAME = struct.Struct(">cI")
_HANGUP = select.POLLHUP | select.POLLERR | select.POLLNVAL


class CallerGone(Exception):
    """The other end closed its socket."""


class Port:
    """One virtio-serial port."""

    def __init__(self, device: str) -> None:
        self._fd = os.open(device, os.O_RDWR | os.O_NONBLOCK)
        self._poll = select.poll()

    def fd(self) -> int:
        """The descriptor, for polling beside others."""
        return self._fd

    def gone(self) -> bool:
        """Whether nobody holds the other end."""
        self._poll.register(self._fd, select.POLLIN)
        return any(event & _HANGUP for _, event in self._poll.poll(0))

    def line(self) -> bytes:
        """Waits for one line; lines of callers who left before it was whole are dropped."""
        data = b""
        while not data.endswith(b"\n"):
            if self.gone():
                data = b""
                time.sleep(0.02)
                continue
            select.select([self._fd], [], [], 1)
            try:
                data += os.read(self._fd, 65536)
            except BlockingIOError:
                continue
        return data

    def write(self, data: bytes) -> None:
        """Writes all of `data` as fast as the other end takes it."""
        while data:
            try:
                data = data[os.write(self._fd, data):]
            except BlockingIOError:
                if self.gone():
                    raise CallerGone from None
                select.select([], [self._fd], [], 0.5)

    def frame(self, kind: bytes, data: bytes) -> None:
        """Writes one frame."""
        self.write(_FRAME.pack(kind, len(data)) + data)


def _relay(port: Port, child: subprocess.Popen[bytes]) -> None:
    """Sends the child's output until both its streams end."""
    assert child.stdout and child.stderr
    poll = select.poll()
    kinds = {child.stdout.fileno(): b"o", child.stderr.fileno(): b"e"}
    for fd in kinds:
        poll.register(fd, select.POLLIN)
    ended: float | None = None
    while kinds:
        for fd, _ in poll.poll(200):
            data = os.read(fd, 65536)
            if data:
                port.frame(kinds[fd], data)
            else:
                poll.unregister(fd)
                del kinds[fd]
        if port.gone():
            raise CallerGone
        # A daemon started by the command may hold the streams open for ever.
        if child.poll() is not None:
            ended = ended or time.monotonic()
            if time.monotonic() - ended > 1:
                return


def _serve_one(port: Port) -> None:
    request = json.loads(port.line())
    port.write(request["token"].encode())
    try:
        child = subprocess.Popen(
            request["argv"], cwd=request.get("cwd") or "/", env=os.environ | request.get("env", {}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )
    except OSError as error:
        port.frame(b"e", f"nested: {error}\n".encode())
        port.frame(b"x", b"127")
        return
    try:
        assert child.stdin
        try:
            child.stdin.write(request.get("stdin", "").encode())
            child.stdin.close()
        except BrokenPipeError:
            pass
        _relay(port, child)
        status = child.wait()
        port.frame(b"x", str(status if status >= 0 else 128 - status).encode())
    finally:
        if child.poll() is None:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Asks the child's session to end, then makes it."""
    for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
        try:
            os.killpg(child.pid, number)
            child.wait(patience)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _serve(device: str) -> None:
    port = Port(device)
    while True:
        try:
            _serve_one(port)
        except CallerGone:
            continue
        except (ValueError, KeyError) as error:
            print(f"agent: {device}: bad request: {error}", file=sys.stderr, flush=True)


def main() -> None:
    """Serves every port for ever."""
    threads = []
    for name in sorted(Path("/sys/class/virtio-ports").glob("*/name")):
        if name.read_text(encoding="ascii").startswith("ovms."):
            thread = threading.Thread(target=_serve, args=(f"/dev/{name.parent.name}",))
            thread.start()
            threads.append(thread)
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
