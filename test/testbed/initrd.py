"""Writes initrds: cpio archives in the kernel's `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst)."""

from __future__ import annotations

import gzip
import stat
from pathlib import Path


class Initrd:
    """An initrd under construction; everything in it belongs to root and has no time stamp, so equal contents give equal bytes."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0
        self._dirs: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        self._out += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._out += data
        self._pad()

    def _pad(self) -> None:
        self._out += b"\0" * (-len(self._out) % 4)

    def directory(self, path: str) -> None:
        """Adds a directory and its parents."""
        path = path.strip("/")
        parent = path.rpartition("/")[0]
        if parent:
            self.directory(parent)
        if path not in self._dirs:
            self._dirs.add(path)
            self._entry(path, stat.S_IFDIR | 0o755)

    def _parent(self, path: str) -> str:
        path = path.strip("/")
        if "/" in path:
            self.directory(path.rpartition("/")[0])
        return path

    def file(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """Adds a file."""
        raw = data.encode() if isinstance(data, str) else data
        self._entry(self._parent(path), stat.S_IFREG | mode, raw)

    def link(self, path: str, target: str) -> None:
        """Adds a symbolic link."""
        self._entry(self._parent(path), stat.S_IFLNK | 0o777, target.encode())

    def char_device(self, path: str, major: int, minor: int) -> None:
        """Adds a character device."""
        self._entry(self._parent(path), stat.S_IFCHR | 0o600, device=(major, minor))

    def busybox(self, binary: Path) -> None:
        """Adds busybox with a shell by name; other applets are called as `busybox NAME`."""
        self.file("bin/busybox", binary.read_bytes(), 0o755)
        self.link("bin/sh", "busybox")
        self.directory("dev")
        self.char_device("dev/console", 5, 1)
        self.char_device("dev/null", 1, 3)

    def write(self, path: Path) -> None:
        """Ends the archive and writes it, gzipped."""
        self._entry("TRAILER!!!", 0)
        path.write_bytes(gzip.compress(bytes(self._out), compresslevel=1, mtime=0))
