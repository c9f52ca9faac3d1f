"""Debian trixie, unpacked: the root file system of the nested host and the stock kernel of the guests.

The nested host's kernel and the test guests' kernel are the same unmodified package, so one
bootstrap serves both. Packages come from the configured Debian mirror through mmdebstrap.
"""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
from pathlib import Path

from . import cache

SUITE = "trixie"

#: What the nested host needs to run containerd, ovms and the test cases.
HOST_PACKAGES = (
    "linux-image-cloud-amd64",
    "busybox-static",
    "ca-certificates",
    "containernetworking-plugins",
    "docker-registry",
    "e2fsprogs",
    "iproute2",
    "iptables",
    "kmod",
    "nftables",
    "procps",
    "python3",
    "qemu-system-x86",
    "qemu-utils",
    "runc",
    "seabios",
    "skopeo",
    "strace",
    "systemd",
    "util-linux",
    "zstd",
)


def _mmdebstrap(packages: tuple[str, ...], target: Path) -> None:
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", "--format=directory",
         f"--include={','.join(packages)}",
         "--dpkgopt=path-exclude=/usr/share/doc/*",
         "--dpkgopt=path-exclude=/usr/share/man/*",
         "--dpkgopt=path-exclude=/usr/share/locale/*",
         "--aptopt=Acquire::Retries \"3\"",
         SUITE, str(target)],
        check=True, stdin=subprocess.DEVNULL,
    )


def ext4_image(tree: Path, image: Path, size: str, label: str) -> None:
    """Writes `tree` into a sparse ext4 image without a partition table."""
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-L", label, "-E", "lazy_itable_init=1,lazy_journal_init=1",
         "-d", str(tree), str(image), size],
        check=True, stdout=subprocess.DEVNULL,
    )


def _build_host(out: Path) -> None:
    tree = out / "rootfs"
    try:
        _mmdebstrap(HOST_PACKAGES, tree)
        kernels = sorted(tree.glob("boot/vmlinuz-*"))
        shutil.copy(kernels[-1], out / "vmlinuz")
        release = kernels[-1].name.removeprefix("vmlinuz-")
        shutil.copytree(tree / "lib/modules" / release, out / "modules" / release, symlinks=True)
        shutil.copy(tree / "bin/busybox", out / "busybox")
        for image in tree.glob("boot/initrd.img-*"):
            image.unlink()
        ext4_image(tree, out / "host.ext4", "6G", "host")
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def host() -> Path:
    """The nested host: `host.ext4`, `vmlinuz`, `modules/<release>/` and a static `busybox`."""
    key = cache.recipe_key("1", SUITE, *HOST_PACKAGES)
    return cache.entry("debian-host", key, _build_host)


class Modules:
    """The kernel modules of an unpacked Debian kernel package."""

    def __init__(self, tree: Path) -> None:
        self.release = next(tree.iterdir()).name
        self._base = tree / self.release
        self._needs: dict[str, list[str]] = {}
        self._paths: dict[str, str] = {}
        for line in (self._base / "modules.dep").read_text(encoding="ascii").splitlines():
            path, _, needs = line.partition(":")
            self._paths[_name(path)] = path
            self._needs[_name(path)] = [_name(need) for need in needs.split()]

    def in_load_order(self, *wanted: str) -> list[tuple[str, bytes]]:
        """Names and unpacked contents of the modules and all they need; built-in ones are left out."""
        order: list[str] = []
        for name in wanted:
            if name not in self._paths:
                continue
            # modules.dep lists the nearest dependency first.
            for step in [*reversed(self._needs[name]), name]:
                if step not in order:
                    order.append(step)
        return [(f"{name}.ko", self._read(name)) for name in order]

    def _read(self, name: str) -> bytes:
        data = (self._base / self._paths[name]).read_bytes()
        return lzma.decompress(data) if self._paths[name].endswith(".xz") else data


def _name(path: str) -> str:
    return os.path.basename(path).split(".")[0].replace("-", "_")
