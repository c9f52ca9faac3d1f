"""The test bed of one case: a temporary directory and everything private that is started in it."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from . import oci, process
from .case import CaseFailed
from .containerd import Containerd
from .guests import Guests
from .leftovers import Leftovers
from .ovms import Ovms
from .registry import Registry


class Bed:
    """What a case is given. Parts come into being when they are first asked for and go with the case."""

    def __init__(self, release: str, guests: Guests, patience: float) -> None:
        token = "oe" + secrets.token_hex(3)
        self.release = release
        self.guests = guests
        #: Seconds that something quick may take here; an emulated host needs more than a real one.
        self.patience = patience
        # Unix socket paths are at most 107 bytes long, so this one is short.
        self.dir = Path(tempfile.mkdtemp(prefix=token, dir="/tmp"))
        self.namespace = token
        self._leftovers = Leftovers(token)
        self._closers: list[Callable[[], None]] = []

    def later(self, closer: Callable[[], None]) -> None:
        """Has `closer` called at the end of the case, whatever happens; the last one first."""
        self._closers.append(closer)

    @cached_property
    def ovms(self) -> Ovms:
        """The programs of ovms with settings of their own; its snapshotter is started on first use."""
        ovms = Ovms(self.dir, self.patience)
        self.later(ovms.stop)
        return ovms

    @cached_property
    def containerd(self) -> Containerd:
        """containerd with ovms configured into it. The snapshotter is not running until it is started."""
        return self.start_containerd("c", self.ovms.snippet(self.release))

    @cached_property
    def plain_containerd(self) -> Containerd:
        """containerd as it comes, without a word of ovms in its configuration."""
        return self.start_containerd("p", "")

    def start_containerd(self, name: str, snippet: str) -> Containerd:
        """Starts a further containerd with the given additional configuration."""
        path = self.ovms.path if snippet else []
        env = self.ovms.env if snippet else {}
        containerd = Containerd(self.release, self.dir / name, self.namespace, self.patience, path, env, snippet)

        def close() -> None:
            try:
                containerd.purge()
            finally:
                containerd.stop()

        self.later(close)
        return containerd

    @cached_property
    def registry(self) -> Registry:
        """A registry on 127.0.0.1."""
        registry = Registry(self.dir / "registry", self.patience)
        self.later(registry.stop)
        return registry

    def ordinary(self, image: oci.Image) -> Path:
        """Writes an ordinary image as an OCI layout."""
        return oci.write(image, Path(tempfile.mkdtemp(prefix="image", dir=self.dir)))

    def close(self) -> list[str]:
        """Ends everything; returns what went wrong on the way and what is left on the machine."""
        wrong: list[str] = []
        while self._closers:
            try:
                self._closers.pop()()
            except (CaseFailed, OSError) as error:
                wrong.append(f"at the end: {error}")
        wrong += [f"left behind: {what}" for what in self._leftovers.find()]
        self._leftovers.remove()
        shutil.rmtree(self.dir, ignore_errors=True)
        if self.dir.exists():
            wrong.append(f"cannot remove {self.dir}")
        return wrong

    def save_logs(self, destination: Path) -> None:
        """Copies the logs of the daemons aside, for a case that failed."""
        destination.mkdir(parents=True, exist_ok=True)
        for log in self.dir.glob("**/log"):
            if log.is_file():
                name = "-".join(log.relative_to(self.dir).parts)
                shutil.copy(log, destination / name)

    def run(self, argv: list[str | Path], *, status: int | None = 0, timeout: float | None = None) -> process.Done:
        """Runs a command with the settings of this bed."""
        return process.run(argv, status=status, timeout=timeout or self.patience * 4, env=self.ovms.env)
