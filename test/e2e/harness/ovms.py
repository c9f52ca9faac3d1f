"""The programs of ovms as built in this checkout, with settings private to a case."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from . import process
from .case import CaseFailed, major
from .process import Daemon

REPO = Path(__file__).resolve().parents[3]
PROGRAMS = ("ovm", "ovm-transfer", "ovms-vmm", "ovms-snapshotter", "containerd-shim-ovms-v1")
RUNTIME = "io.containerd.ovms.v1"


def binaries() -> Path:
    """Where the programs are: OVMS_BIN_DIR, or the checkout's release build."""
    return Path(os.environ.get("OVMS_BIN_DIR") or REPO / "target/release")


def program(name: str) -> Path:
    """The path of one program; fails the case if it has not been built."""
    path = binaries() / name
    if not path.exists():
        raise CaseFailed(f"{name} is not in {path.parent}: run `make build`")
    return path


class Ovms:
    """One installation of ovms below a case's directory."""

    def __init__(self, directory: Path, patience: float) -> None:
        self.directory = directory / "o"
        self.directory.mkdir()
        self._patience = patience
        self.socket = self.directory / "s.sock"
        self.bundle_socket = self.directory / "b.sock"
        self.state = self.directory / "state"
        self.runtime = self.directory / "run"
        self.settings = self.directory / "ovms.toml"
        self.path = [binaries()]
        self.write_settings()
        #: Environment that makes every program of ovms use these settings.
        self.env = {"OVMS_CONFIG": str(self.settings)}
        self.snapshotter: Daemon | None = None

    def program(self, name: str) -> Path:
        """The path of one program."""
        return program(name)

    def write_settings(self, *, kvm: str = "/dev/kvm", extra: str = "") -> None:
        """Writes ovms.toml."""
        self.settings.write_text(
            f'[paths]\nstate = "{self.state}"\nruntime = "{self.runtime}"\n'
            f'snapshotter_socket = "{self.socket}"\nbundle_socket = "{self.bundle_socket}"\n'
            f'containerd_socket = "{self.directory.parent / "c/c.sock"}"\nkvm = "{kvm}"\n{extra}',
            encoding="utf-8",
        )

    def snippet(self, release: str) -> str:
        """The shipped containerd configuration for a release, with the sockets of this case."""
        name = "ovms-v3.toml" if major(release) == 2 else "ovms-v2.toml"
        shipped = REPO / "config/containerd" / name
        text = shipped.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith("version")]
        return "\n".join(lines).replace("/run/ovms/ovms.sock", str(self.socket)) + "\n"

    def start_snapshotter(self) -> Daemon:
        """Starts the snapshotter, or starts it again."""
        if self.snapshotter and self.snapshotter.alive():
            return self.snapshotter
        daemon = Daemon(
            "ovms-snapshotter", [self.program("ovms-snapshotter"), "--config", self.settings], self.directory / "log", self.env
        )
        self.snapshotter = daemon
        daemon.await_ready(self.socket.exists, self._patience)
        return daemon

    def stop_snapshotter(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends the snapshotter."""
        if self.snapshotter:
            self.snapshotter.stop(number)
            self.snapshotter = None
            self.socket.unlink(missing_ok=True)

    def kill_snapshotter(self) -> None:
        """Ends the snapshotter as a crash would."""
        self.stop_snapshotter(signal.SIGKILL)

    def start_snapshotter_by_socket(self) -> Daemon:
        """Leaves the snapshotter to socket activation: it is started by the first connection, as under systemd."""
        self.snapshotter = Daemon(
            "systemd-socket-activate",
            ["systemd-socket-activate", f"--listen={self.socket}", f"--listen={self.bundle_socket}", "--fdname=ovms:bundle",
             f"--setenv=OVMS_CONFIG={self.settings}", self.program("ovms-snapshotter"), "--config", self.settings],
            self.directory / "log", self.env,
        )
        self.snapshotter.await_ready(self.socket.exists, self._patience)
        return self.snapshotter

    def put_runtime_on_tmpfs(self) -> None:
        """Mounts a tmpfs where the machines' records lie, as /run is one on every host with systemd; before anything is started."""
        self.runtime.mkdir()
        process.run(["mount", "-t", "tmpfs", "-o", "mode=0700", "tmpfs", self.runtime])

    def stop(self) -> None:
        """Ends it all."""
        self.stop_snapshotter()
        if self.runtime.is_mount():
            process.run(["umount", self.runtime])

    def ovm(self, *words: str | Path, status: int | None = 0, timeout: float | None = None, stdin: str | None = None) -> process.Done:
        """Runs `ovm`."""
        return process.run([self.program("ovm"), *words], status=status, timeout=timeout or self._patience * 4,
                           stdin=stdin, env=self.env)
