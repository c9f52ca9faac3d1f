"""A nested host: a stock Debian under QEMU's TCG, whose emulated AMD SVM gives it a full /dev/kvm.

Where the machine itself cannot run an unmodified kernel under KVM, the tests that need one run
in here. The checkout and the cache are shared into it at the paths they have outside, so a
command means the same on both sides. One such host is started once and fed many commands.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from . import cache, debian
from .initrd import Initrd

REPO = Path(__file__).resolve().parents[2]
_SCRIPTS = Path(__file__).parent / "host"
_PORTS = 6
_FRAME = struct.Struct(">cI")
#: Variables that a command in the host gets from here, beside those of ovms.
_PASSED = ("CONTAINERD", "RUST_LOG", "RUST_BACKTRACE")
_VIRTIOFSD = "/usr/lib/qemu/virtiofsd"

#: Emulated and on a busy machine: generous, since a host that never comes up is found by its exit.
_BOOT_TIMEOUT = 240


class NestedError(Exception):
    """The nested host cannot be started or reached."""


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    status: int
    stdout: bytes
    stderr: bytes


class NestedHost:
    """The nested host of one state directory; several processes may use it at once."""

    def __init__(self, state: Path) -> None:
        self._state = state

    @classmethod
    def default(cls) -> NestedHost:
        """The host shared by everything that runs from this checkout."""
        name = "ovms-nested-" + cache.recipe_key(str(REPO))[:8]
        return cls(Path(os.environ.get("OVMS_NESTED_DIR") or f"/tmp/{name}"))

    @property
    def console(self) -> Path:
        """The file with the host's serial console."""
        return self._state / "console.log"

    def running(self) -> bool:
        """Whether its QEMU lives."""
        return self._pid("qemu") is not None

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Has the host running for the time of the block. A host that only blocks like this wanted ends with the last of them."""
        self._state.mkdir(parents=True, exist_ok=True)
        wanted_by_hand = self._state / "by-hand"
        with open(self._state / "users.lock", "w", encoding="ascii") as users:
            fcntl.flock(users, fcntl.LOCK_SH)
            if self.start():
                wanted_by_hand.unlink(missing_ok=True)
            try:
                yield
            finally:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not wanted_by_hand.exists():
                        self.stop()

    def start_by_hand(self) -> None:
        """Starts the host unless it runs, to stay until it is stopped by hand."""
        self.start()
        (self._state / "by-hand").touch()

    def in_use(self) -> bool:
        """Whether a block of `use` is under way somewhere."""
        self._state.mkdir(parents=True, exist_ok=True)
        with open(self._state / "users.lock", "w", encoding="ascii") as users:
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def start(self, memory_mib: int = 4096) -> bool:
        """Starts the host unless it runs, and waits until it takes commands; says whether it was this call that started it."""
        host = debian.host()
        self._state.mkdir(parents=True, exist_ok=True)
        with self._locked("start"):
            if self.running():
                return False
            cache.say(f"starting the nested host (console in {self.console})")
            began = time.monotonic()
            try:
                self._launch(host, memory_mib)
                self._await_boot()
            except BaseException:
                self.stop()
                raise
            cache.say(f"nested host ready after {time.monotonic() - began:.0f} s")
            return True

    def _launch(self, host: Path, memory_mib: int) -> None:
        initrd = self._state / "initrd.img"
        _write_initrd(host, initrd)
        shares = [("repo", REPO, "rw"), ("cache", cache.root(), "ro")]
        disk = self._state / "disk.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(host / "host.ext4"), "-F", "raw", str(disk)],
            check=True,
        )
        # One processor unless asked otherwise: with two, QEMU 7.2 and 10.0 alike break the host's kernel or a guest's after
        # a handful of nested boots (stacks overwritten, half-patched code executed, triple faults), and it is no faster.
        argv = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max", "-M", "q35,memory-backend=ram",
            "-smp", os.environ.get("OVMS_NESTED_CPUS", "1"), "-m", str(memory_mib), "-object", f"memory-backend-memfd,id=ram,size={memory_mib}M,share=on",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{self.console}",
            "-kernel", str(host / "vmlinuz"), "-initrd", str(initrd),
            "-drive", f"file={disk},format=qcow2,if=virtio,cache=unsafe",
            "-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
            "-device", "virtio-serial-pci,max_ports=16",
        ]
        for port in range(_PORTS):
            socket_path = self._socket(port)
            socket_path.unlink(missing_ok=True)
            argv += ["-chardev", f"socket,id=port{port},path={socket_path},server=on,wait=off",
                     "-device", f"virtserialport,chardev=port{port},name=ovms.{port}"]
        words = ["console=ttyS0", "quiet", "panic=-1", f"ovms.init={_SCRIPTS / 'init'}"]
        for tag, path, mode in shares:
            self._start_virtiofsd(tag, path)
            argv += ["-chardev", f"socket,id={tag},path={self._state / f'{tag}.sock'}",
                     "-device", f"vhost-user-fs-pci,chardev={tag},tag={tag}"]
            words.append(f"ovms.share={tag}:{path}:{mode}")
        argv += ["-append", " ".join(words)]
        self._spawn("qemu", argv)

    def _start_virtiofsd(self, tag: str, path: Path) -> None:
        socket_path = self._state / f"{tag}.sock"
        socket_path.unlink(missing_ok=True)
        self._spawn(f"virtiofsd-{tag}", [
            _VIRTIOFSD, f"--socket-path={socket_path}", "-o", f"source={path}", "-o", "cache=always",
            "-o", "sandbox=chroot", "-o", "timeout=1", "--rlimit-nofile=0", "-f",
        ])
        deadline = time.monotonic() + 10
        while not socket_path.exists():
            if time.monotonic() > deadline or self._pid(f"virtiofsd-{tag}") is None:
                raise NestedError(f"cannot share {path}: see {self._state}/virtiofsd-{tag}.log")
            time.sleep(0.02)

    def _spawn(self, name: str, argv: list[str]) -> None:
        with open(self._state / f"{name}.log", "wb") as log:
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        stat = Path(f"/proc/{child.pid}/stat").read_text(encoding="ascii")
        (self._state / f"{name}.pid").write_text(f"{child.pid} {_start_time(stat)}", encoding="ascii")

    def _pid(self, name: str) -> int | None:
        """The pid of a process of ours that still lives, told from a later one with the same number by its start time."""
        try:
            pid, started = (self._state / f"{name}.pid").read_text(encoding="ascii").split()
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        alive = _start_time(stat) == started and stat.rpartition(")")[2].split()[0] != "Z"
        return int(pid) if alive else None

    def _await_boot(self) -> None:
        deadline = time.monotonic() + _BOOT_TIMEOUT
        while time.monotonic() < deadline:
            if not self.running():
                break
            with contextlib.suppress(OSError, NestedError):
                found = self.run(["test", "-c", "/dev/kvm"], timeout=min(60.0, deadline - time.monotonic()))
                if found.status == 0:
                    return
                break
            time.sleep(0.2)
        raise NestedError(f"the nested host did not come up, or without /dev/kvm: see {self.console} and {self._state}/qemu.log")

    def stop(self) -> None:
        """Ends the host and removes its disk; whatever it wrote there is lost on purpose."""
        for name in ("qemu", *(f"virtiofsd-{tag}" for tag in ("repo", "cache"))):
            pid = self._pid(name)
            if pid is not None:
                _end(pid)
            (self._state / f"{name}.pid").unlink(missing_ok=True)
        (self._state / "disk.qcow2").unlink(missing_ok=True)

    def run(self, argv: list[str], *, cwd: str = "/", env: dict[str, str] | None = None, stdin: str = "",
            timeout: float | None = None) -> Result:
        """Runs a command in the host and collects its output."""
        out, err = bytearray(), bytearray()
        status = 255
        for kind, data in self.stream(argv, cwd=cwd, env=env, stdin=stdin, timeout=timeout):
            if kind == b"o":
                out += data
            elif kind == b"e":
                err += data
            else:
                status = int(data)
        return Result(status, bytes(out), bytes(err))

    def stream(self, argv: list[str], *, cwd: str = "/", env: dict[str, str] | None = None, stdin: str = "",
               timeout: float | None = None) -> Iterator[tuple[bytes, bytes]]:
        """Runs a command in the host and yields its output as it comes: `(b"o" | b"e", data)`, at the end `(b"x", status)`."""
        token = secrets.token_hex(16)
        request = {"token": token, "argv": argv, "cwd": cwd, "env": env or {}, "stdin": stdin}
        with self._port() as connection:
            connection.settimeout(timeout)
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as reader:
                _skip_to(reader, token.encode())
                while True:
                    kind, length = _FRAME.unpack(_exactly(reader, _FRAME.size))
                    yield kind, _exactly(reader, length)
                    if kind == b"x":
                        return

    @contextlib.contextmanager
    def _port(self) -> Iterator[socket.socket]:
        """Connects to a port that no other command uses, waiting for one if need be."""
        while True:
            for port in range(_PORTS):
                with open(self._state / f"port{port}.lock", "w", encoding="ascii") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        continue
                    with socket.socket(socket.AF_UNIX) as connection:
                        try:
                            connection.connect(str(self._socket(port)))
                        except OSError as error:
                            raise NestedError("the nested host does not run: start it first") from error
                        yield connection
                        return
            time.sleep(0.1)

    def _socket(self, port: int) -> Path:
        return self._state / f"port{port}.sock"

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self._state / f"{name}.lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _write_initrd(host: Path, out: Path) -> None:
    initrd = Initrd()
    initrd.busybox(host / "busybox")
    for name in ("proc", "sys", "root"):
        initrd.directory(name)
    loaded = debian.Modules(host / "modules").in_load_order("virtio_pci", "virtio_blk", "ext4", "virtiofs", "virtio_rng")
    for name, data in loaded:
        initrd.file(f"modules/{name}", data)
    initrd.file("modules/order", "".join(f"{name}\n" for name, _ in loaded))
    initrd.file("init", (_SCRIPTS / "initrd-init").read_bytes(), 0o755)
    initrd.write(out)


def _start_time(stat: str) -> str:
    # Field 22 of proc_pid_stat(5); the name in brackets may hold blanks.
    return stat.rpartition(")")[2].split()[19]


def _end(pid: int) -> None:
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if not Path(f"/proc/{pid}").exists():
                return
            time.sleep(0.05)


def _skip_to(reader: BinaryIO, token: bytes) -> None:
    seen = b""
    while not seen.endswith(token):
        seen = (seen + _exactly(reader, 1))[-len(token):]


def _exactly(reader: BinaryIO, length: int) -> bytes:
    try:
        data = reader.read(length)
    except TimeoutError as error:
        raise NestedError("the nested host has long said nothing") from error
    if data is None or len(data) < length:
        raise NestedError("the nested host went away")
    return data


def relay(host: NestedHost, argv: list[str], *, cwd: str, silence: float | None = None) -> int:
    """Runs a command with our settings, its output going to ours; returns its exit status.

    `silence`: seconds that it may say nothing.
    """
    env = {name: value for name, value in os.environ.items() if name.startswith("OVMS_") or name in _PASSED}
    for kind, data in host.stream(argv, cwd=cwd, env=env, timeout=silence):
        if kind == b"x":
            return int(data)
        stream = sys.stdout.buffer if kind == b"o" else sys.stderr.buffer
        stream.write(data)
        stream.flush()
    return 255
