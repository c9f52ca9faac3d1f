"""nerdctl on a case's containerd."""

from __future__ import annotations

from pathlib import Path

from testbed import gotools

from . import process
from .bed import Bed


class Nerdctl:
    """nerdctl on the bed's containerd with a data root of its own."""

    def __init__(self, bed: Bed) -> None:
        self._bed = bed
        networks = bed.dir / "cni"
        networks.mkdir()
        self._words: list[str | Path] = [
            gotools.directory(gotools.NERDCTL) / "nerdctl", "--address", bed.containerd.socket, "--namespace", bed.namespace,
            "--snapshotter", "ovms", "--data-root", bed.dir / "nerdctl", "--cni-path", "/usr/lib/cni",
            "--cni-netconfpath", networks, "--cgroup-manager", "cgroupfs",
        ]

    def __call__(self, *words: str, status: int | None = 0) -> process.Done:
        return process.run([*self._words, *words], status=status, timeout=self._bed.patience * 4, env=self._bed.containerd.env)
