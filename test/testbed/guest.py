"""The stock Debian test image as the files that `ovm build` takes: kernel, initrd, qcow2 base and qcow2 diff.

The base disk is a small ext4 without a partition table. The diff layer holds exactly the clusters
that adding `/etc/ovms-diff` changes, so a guest that can read this file has both layers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import cache, debian
from .initrd import Initrd

_SCRIPTS = Path(__file__).parent / "guest"

#: The contents of `/etc/ovms-base` and `/etc/ovms-diff`.
BASE_LINE = "the base layer was here first"
DIFF_LINE = "only the diff layer knows this"

#: Modules of the Debian cloud kernel that a guest of ovms uses; built-in ones cost nothing here.
_MODULES = ("virtio_pci", "virtio_blk", "ext4", "button", "evdev", "pvpanic", "pvpanic_pci",
            "virtio_balloon", "virtio_rng", "virtio_console", "vmgenid")

_DISK_MIB = 64
_CLUSTER = 64 * 1024

#: Applets that the guest's init calls by name.
_APPLETS = ("cat", "cttyhack", "date", "dd", "dmesg", "echo", "free", "grep", "head", "ls", "md5sum", "mount", "nproc",
            "od", "poweroff", "ps", "reboot", "sed", "seq", "setsid", "sh", "sleep", "stty", "sync", "tail", "tr", "uname",
            "usleep", "wc")


@dataclass(frozen=True)
class Guest:
    """The parts of the image."""

    kernel: Path
    initrd: Path
    base: Path
    diff: Path
    args: str = "console=ttyS0 quiet panic=-1 root=/dev/vda rw"


def _initrd(host: Path, out: Path) -> None:
    initrd = Initrd()
    initrd.busybox(host / "busybox")
    for name in ("proc", "sys", "root"):
        initrd.directory(name)
    loaded = debian.Modules(host / "modules").in_load_order(*_MODULES)
    for name, data in loaded:
        initrd.file(f"modules/{name}", data)
    initrd.file("modules/order", "".join(f"{name}\n" for name, _ in loaded))
    initrd.file("init", (_SCRIPTS / "initrd-init").read_bytes(), 0o755)
    initrd.write(out)


def _tree(host: Path, tree: Path) -> None:
    for name in ("bin", "sbin", "etc", "proc", "sys", "dev", "tmp", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy(host / "busybox", tree / "bin/busybox")
    for applet in _APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    shutil.copy(_SCRIPTS / "init", tree / "sbin/init")
    (tree / "sbin/init").chmod(0o755)
    (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n", encoding="ascii")
    (tree / "etc/group").write_text("root:x:0:\n", encoding="ascii")
    (tree / "etc/ovms-base").write_text(BASE_LINE + "\n", encoding="ascii")


def _changed(before: Path, after: Path) -> Iterator[int]:
    with open(before, "rb") as old, open(after, "rb") as new:
        offset = 0
        while chunk := new.read(_CLUSTER):
            if chunk != old.read(_CLUSTER):
                yield offset
            offset += _CLUSTER


def diff_qcow2(before: Path, after: Path, out: Path) -> None:
    """Writes the clusters in which two raw images of one size differ as a qcow2 that names no backing file."""
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={_CLUSTER}", str(out), str(after.stat().st_size)],
        check=True,
    )
    commands: list[str] = []
    with open(after, "rb") as new:
        for offset in _changed(before, after):
            new.seek(offset)
            piece = out.with_suffix(f".{offset}")
            piece.write_bytes(new.read(_CLUSTER))
            commands += ["-c", f"write -q -s {piece} {offset} {piece.stat().st_size}"]
    try:
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(out)], check=True)
    finally:
        for piece in out.parent.glob(f"{out.stem}.[0-9]*"):
            piece.unlink()


def _build(out: Path) -> None:
    host = debian.host()
    os.link(host / "vmlinuz", out / "vmlinuz")
    _initrd(host, out / "initrd.img")
    _tree(host, out / "tree")
    base, changed = out / "base.raw", out / "changed.raw"
    debian.ext4_image(out / "tree", base, f"{_DISK_MIB}M", "ovms-test")
    subprocess.run(["cp", "--sparse=always", str(base), str(changed)], check=True)
    line = out / "line"
    line.write_text(DIFF_LINE + "\n", encoding="ascii")
    subprocess.run(["debugfs", "-w", "-R", f"write {line} etc/ovms-diff", str(changed)], check=True, capture_output=True)
    diff_qcow2(base, changed, out / "diff.qcow2")
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(base), str(out / "base.qcow2")], check=True)
    shutil.rmtree(out / "tree")
    for scratch in (base, changed, line):
        scratch.unlink()


def guest() -> Guest:
    """The image's parts, made if need be."""
    here = Path(__file__)
    key = cache.recipe_key(debian.host().name, here, here.with_name("initrd.py"), _SCRIPTS)
    out = cache.entry("debian-guest", key, _build)
    return Guest(out / "vmlinuz", out / "initrd.img", out / "base.qcow2", out / "diff.qcow2")
