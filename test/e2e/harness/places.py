"""Where cases can run on this machine, and why not elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

NAMES = ("native", "nested", "direct")


def hardware_virtualisation() -> bool:
    """Whether the CPU shows svm or vmx, so that /dev/kvm boots a stock kernel."""
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return any(word in ("svm", "vmx") for line in flags.splitlines() if line.startswith("flags") for word in line.split())


def without_kvm() -> str:
    """Why guests cannot run on this machine itself; empty if they can."""
    if not os.path.exists("/dev/kvm"):
        return "there is no /dev/kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is not permitted to this user"
    return ""


def unusable(place: str) -> str:
    """Why no case at all can run in a place; empty if some can."""
    if os.geteuid() != 0:
        return "only root can start containerd"
    if place == "direct" and not hardware_virtualisation():
        return "the CPU has neither svm nor vmx, so an unmodified kernel does not boot here"
    if place == "direct":
        return without_kvm()
    if place == "nested" and not shutil.which("qemu-system-x86_64"):
        return "there is no qemu-system-x86_64 to emulate a host with: run `make deps`"
    return ""


def chosen(where: str) -> list[str]:
    """The places that a choice stands for."""
    if where != "auto":
        return [where]
    return ["native", "direct" if hardware_virtualisation() else "nested"]
