"""Bad input gets a clear error at the earliest point and leaves nothing half-made."""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

from e2e.harness import oci, picture, process
from e2e.harness.bed import Bed
from e2e.harness.case import case, check
from e2e.harness.ovms import REPO, RUNTIME

from .pull import push_with_oras, without_our_differ

_MANIFEST = "application/vnd.ovms.manifest.v1+json"


def _manifest(bed: Bed, **changes: object) -> Path:
    """A hand-written manifest whose refs are files, with some fields changed."""
    parts = bed.guests.parts("poweroff")
    manifest: dict[str, object] = {
        "schemaVersion": 1, "mediaType": _MANIFEST, "name": "bad", "version": "1",
        "kernel": {"ref": str(parts.kernel), "args": parts.args},
        "diskLayers": [{"ref": str(disk), "format": "qcow2", "size": disk.stat().st_size} for disk in parts.disks],
    }
    if parts.initrd:
        manifest["initrd"] = {"ref": str(parts.initrd)}
    path = bed.dir / "manifest.json"
    path.write_text(json.dumps(manifest | changes), encoding="utf-8")
    return path


def _build_is_refused(bed: Bed, manifest: Path, *wanted: str) -> None:
    out = bed.dir / "out"
    bed.refused(lambda: bed.ovms.ovm("build", "-f", manifest, "-o", out, status=None), *wanted)
    check(not out.exists(), f"a half-made image is left in {out}")


@case(vm=False, guests=("native",), containerds=())
def build_with_an_unknown_schema_version(bed: Bed) -> None:
    """schemaVersion 2 is refused by name."""
    _build_is_refused(bed, _manifest(bed, schemaVersion=2), "schemaVersion", "2")


@case(vm=False, guests=("native",), containerds=())
def build_for_another_architecture(bed: Bed) -> None:
    """arch arm64 is refused by name."""
    _build_is_refused(bed, _manifest(bed, metadata={"platform": {"arch": "arm64"}}), "arm64")


@case(vm=False, guests=("native",), containerds=())
def build_with_uefi(bed: Bed) -> None:
    """`uefi: true` is refused by name."""
    _build_is_refused(bed, _manifest(bed, metadata={"platform": {"arch": "x86_64", "uefi": True}}), "uefi")


@case(vm=False, guests=("native",), containerds=())
def build_with_the_ovfms_format(bed: Bed) -> None:
    """A disk of format ovfms is refused by name."""
    disk = bed.guests.parts("poweroff").disks[0]
    layers = [{"ref": str(disk), "format": "ovfms", "size": disk.stat().st_size}]
    _build_is_refused(bed, _manifest(bed, diskLayers=layers), "ovfms")


@case(vm=False, guests=("native",), containerds=())
def build_with_a_missing_kernel_file(bed: Bed) -> None:
    """A file that is not there is named."""
    _build_is_refused(bed, _manifest(bed, kernel={"ref": "/nowhere/vmlinuz", "args": ""}), "/nowhere/vmlinuz")


@case(vm=False, guests=("native",), containerds=())
def build_with_a_kernel_that_is_none(bed: Bed) -> None:
    """A text file as kernel is refused."""
    text = bed.dir / "kernel.txt"
    text.write_text("this is no kernel\n" * 1000, encoding="ascii")
    sentence = f"{text} is not a kernel that can be booted: it is neither a bzImage nor an ELF file"
    _build_is_refused(bed, _manifest(bed, kernel={"ref": str(text), "args": ""}), sentence)


@case(vm=False, guests=("native",), containerds=())
def build_with_a_command_line_too_long(bed: Bed) -> None:
    """Kernel arguments beyond what the boot protocol takes are refused with the limit."""
    kernel = {"ref": str(bed.guests.parts("poweroff").kernel), "args": "x" * 100_000}
    _build_is_refused(bed, _manifest(bed, kernel=kernel), "command line")


@case(vm=False, guests=("native",), containerds=())
def build_with_a_disk_that_is_no_qcow2(bed: Bed) -> None:
    """A file that is not the qcow2 it is said to be is refused."""
    text = bed.dir / "disk.txt"
    text.write_text("no disk\n" * 1000, encoding="ascii")
    sentence = f"{text} cannot be a disk layer: it is given as qcow2, but it is no qcow2 file"
    _build_is_refused(bed, _manifest(bed, diskLayers=[{"ref": str(text), "format": "qcow2", "size": 8000}]), sentence)


@case(vm=False, guests=("native",), containerds=())
def validate_finds_a_changed_blob(bed: Bed) -> None:
    """A blob whose bytes are not those of its digest is found and named."""
    layout = bed.dir / "layout"
    shutil.copytree(bed.guests.layout("poweroff"), layout)
    blob = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    with open(blob, "r+b") as file:
        file.seek(100)
        file.write(b"\xff\xfe\xfd\xfc")

    bed.refused(lambda: bed.ovms.ovm("validate", layout, status=None), f"sha256:{blob.name}")


@case(guests=("native",))
def a_changed_blob_is_not_imported(bed: Bed) -> None:
    """containerd itself refuses the same, and no snapshot is left."""
    layout = bed.dir / "layout"
    shutil.copytree(bed.guests.layout("poweroff"), layout)
    blob = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x55")
    archive = bed.dir / "image.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layout, ".")

    bed.refused(lambda: bed.containerd.ctr("images", "import", "--snapshotter", "ovms", archive, status=None), "digest")


@case(guests=("native",))
def a_raw_blob_without_its_annotation(bed: Bed) -> None:
    """A raw disk under the tar type that lost its annotation is refused at pull, with the way out."""
    ref = push_with_oras(bed, "vm:1", format_annotation=False)

    bed.refused(lambda: _pull(bed, ref), "ovms.format", "preserve-digests")


@case(guests=("native",))
def a_qcow2_that_names_a_backing_file(bed: Bed) -> None:
    """A layer that points outside itself is refused when it is unpacked."""
    base = bed.guests.disks[0]
    evil = bed.dir / "evil.qcow2"
    bed.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", evil])
    layer = oci.tar([oci.File("ovm/disk.qcow2", evil.read_bytes())])
    layout = oci.Layout(bed.dir / "evil")
    config = {"architecture": "amd64", "os": "linux", "config": {"Entrypoint": ["ovms"]},
              "rootfs": {"type": "layers", "diff_ids": [oci.digest(layer)]}}
    layout.manifest(
        {"schemaVersion": 2, "mediaType": oci.MANIFEST, "config": layout.json(config, oci.CONFIG),
         "layers": [layout.blob(layer, "application/vnd.oci.image.layer.v1.tar")]}, "localhost/evil:1")
    archive = bed.dir / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(layout.directory, ".")

    bed.refused(lambda: bed.containerd.ctr("images", "import", "--snapshotter", "ovms", archive, status=None), "backing")


@case(guests=("native",))
def a_pure_artifact(bed: Bed) -> None:
    """A pure `oras push` artifact cannot become a container; the error says that `ovm pull` makes it runnable."""
    ref = push_with_oras(bed, "vm:1", config=False)
    _pull(bed, ref)

    # containerd itself refuses before anything of ours is asked, so its own words are all there can be from it.
    bed.refused(lambda: bed.vm(ref, "vm", "--rm", status=None))

    layout = bed.dir / "pure"
    bed.run(["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", f"docker://{ref}", f"oci:{layout}:1"])
    bed.refused(lambda: bed.ovms.ovm("run", layout, status=None), "ovm pull")


@case(guests=("native",))
def a_kernel_blob_that_is_missing(bed: Bed) -> None:
    """A manifest whose kernel is not among the image's blobs is refused by its digest."""
    nowhere = "sha256:" + "ab" * 32
    layout = _layout_with_kernel(bed, nowhere)

    bed.refused(lambda: bed.ovms.ovm("validate", layout, status=None), "kernel", nowhere)
    image = bed.import_for_ovms(layout)
    bed.refused(lambda: bed.vm(image, "vm", "--rm", status=None), f"kernel.ref: the image's blob {nowhere} is missing")


@case(guests=("native",))
def a_kernel_that_is_none(bed: Bed) -> None:
    """An image whose kernel blob is a text is refused when the machine is created."""
    layout = _layout_with_kernel(bed, b"this is no kernel\n" * 1000)
    image = bed.import_for_ovms(layout)

    bed.refused(lambda: bed.vm(image, "vm", "--rm", status=None), "the kernel is neither a bzImage nor an ELF file for x86-64")


@case(guests=("native",))
def memory_too_small_for_the_kernel(bed: Bed) -> None:
    """A machine too small for its kernel and initrd is refused with both sizes' names."""
    kernel = bed.guests.parts("poweroff").kernel
    initrd = bed.dir / "initrd"
    initrd.write_bytes(os.urandom(64 << 20))
    layout = bed.dir / "big"
    bed.ovms.ovm("build", "--kernel", kernel, "--initrd", initrd, "--disk", bed.guests.disks[0], "--args", "x",
                 "--name", "big", "--version", "1", "-o", layout)
    image = bed.import_for_ovms(layout)

    bed.refused(lambda: bed.vm(image, "vm", "--rm", "--annotation", "io.ovms.memory=48M", status=None),
                "the initrd (64 MiB) does not fit behind the kernel", "into 48 MiB of memory")


@case(guests=("native",))
def appended_arguments_too_long(bed: Bed) -> None:
    """An annotation that makes the command line too long is refused when the machine is created."""
    image = bed.import_vm("poweroff")

    long = f"io.ovms.kernel-args={'x' * 70_000}"
    bed.refused(lambda: bed.vm(image, "vm", "--rm", "--annotation", long, status=None), "command line")


@case(guests=("native",))
def annotations_that_make_no_sense(bed: Bed) -> None:
    """A number of vCPUs that is none, and memory that is none, are refused by the annotation's name."""
    image = bed.import_vm("poweroff")

    for name, value in (("io.ovms.vcpus", "many"), ("io.ovms.vcpus", "0"), ("io.ovms.memory", "-1"), ("io.ovms.memory", "12 apples")):
        bed.refused(lambda wish=f"{name}={value}": bed.vm(image, "vm", "--rm", "--annotation", wish, status=None), name)


@case(guests=("native",))
def no_kvm_device(bed: Bed) -> None:
    """Without the hypervisor's device the error names it."""
    image = bed.import_vm("poweroff")
    bed.ovms.write_settings(kvm="/dev/no-such-kvm")

    bed.refused(lambda: bed.vm(image, "vm", "--rm", status=None), "/dev/no-such-kvm")


@case(guests=("native",))
def a_kvm_device_that_is_another(bed: Bed) -> None:
    """A device that cannot be opened is named too."""
    image = bed.import_vm("poweroff")
    node = bed.dir / "kvm"
    # No driver has this number.
    os.mknod(node, 0o600 | 0o020000, os.makedev(10, 250))
    bed.ovms.write_settings(kvm=str(node))

    bed.refused(lambda: bed.vm(image, "vm", "--rm", status=None), str(node))


@case(guests=("native",))
def the_snapshotter_is_down(bed: Bed) -> None:
    """A start while the snapshotter is down fails with its socket's name, and one without its bundle service with what to start."""
    image = bed.import_vm("poweroff")
    sockets = (bed.ovms.bundle_socket, bed.ovms.bundle_socket.with_suffix(".away"))
    sockets[0].rename(sockets[1])
    bed.refused(lambda: bed.vm(image, "vm", "--rm", status=None),
                f"the ovms snapshotter does not answer on {sockets[0]}: start it (`systemctl start ovms-bundle.socket`), or set "
                "paths.bundle_socket in ovms.toml to where it listens: No such file or directory")
    sockets[1].rename(sockets[0])
    before = picture.take(bed)
    bed.ovms.stop_snapshotter()

    # containerd has to ask for a snapshot before any shim is started, so these are its own words.
    done = bed.vm(image, "vm", "--rm", status=None)

    bed.failed(done, f"dial unix://{bed.ovms.socket}")
    bed.ovms.start_snapshotter()
    # containerd dials again only after a pause.
    process.until("containerd has found the snapshotter again", lambda: bed.containerd.ctr(
        "snapshots", "--snapshotter", "ovms", "ls", status=None).status == 0, bed.patience)
    bed.await_picture(before, "a start while the snapshotter was down")


@case(guests=("native",))
def a_root_that_overlayfs_made(bed: Bed) -> None:
    """An image unpacked by overlayfs is refused with what to add to the command."""
    layout = bed.guests.layout("poweroff")
    bed.containerd.import_layout(layout, "--snapshotter", "overlayfs")
    image = next(name for name in bed.image_names() if not name.startswith("import-"))

    run = ("run", "--rm", "--snapshotter", "overlayfs", "--runtime", RUNTIME, image, "vm")
    bed.refused(lambda: bed.containerd.ctr(*run, status=None), "--snapshotter ovms")


@case(guests=("native",))
def an_ordinary_image_under_our_runtime(bed: Bed) -> None:
    """busybox under io.containerd.ovms.v1 is refused in plain words."""
    image = bed.import_for_ovms(bed.ordinary(oci.busybox()))

    bed.refused(lambda: bed.vm(image, "vm", "--rm", status=None), "ordinary container image")


@case(guests=("native",))
def a_disk_in_use(bed: Bed) -> None:
    """A second machine on the writable disk of a running one is refused with the first one's name."""
    bed.detached("wait")
    shims = [pid for pid, name in process.descendants().items() if "containerd-shim-ovms-v1" in name and "-id vm" in name]
    check(len(shims) == 1, f"shims: {shims}")
    top = next(bed.ovms.state.glob("s/*/top/data"))

    holder = f"the disk {top} is in use by machine {bed.namespace}/vm, held by process {shims[0]}"
    samedisk = (REPO / "target/e2e/samedisk", bed.containerd.socket, bed.namespace, "vm", "vm2")
    done = bed.refused(lambda: bed.run([*samedisk], status=None), holder)

    check(re.search(re.escape(holder) + r"\b", done.text), f"another process is named: {done.text!r}")
    check(bed.containerd.tasks() == {"vm": "RUNNING"}, f"tasks: {bed.containerd.tasks()}")


@case(guests=("native",))
def without_our_differ_a_raw_blob_is_no_layer(bed: Bed) -> None:
    """Raw blobs need our differ. Without it nothing of ours sees them: containerd's own finds no tar archive, and nothing is left."""
    bed.ovms.start_snapshotter()
    bed.configure_containerd(without_our_differ(bed.ovms.snippet(bed.release)))
    ref = push_with_oras(bed, "vm:1")

    layer = oci.digest(bed.guests.disks[0].read_bytes())
    bed.refused(lambda: _pull(bed, ref), "failed to extract layer", layer, "archive/tar: invalid tar header")


@case(guests=("native",))
def a_foreign_image_with_a_bad_manifest(bed: Bed) -> None:
    """What `ovm build` would have refused is refused at unpacking or at create too, when another tool has built it."""
    kernel = bed.guests.parts("poweroff").kernel.read_bytes()
    changes: dict[str, dict[str, object]] = {
        "schemaVersion": {"schemaVersion": 2}, "arm64": {"metadata": {"platform": {"arch": "arm64"}}},
        "uefi": {"metadata": {"platform": {"arch": "x86_64", "uefi": True}}},
        "ovfms": {"diskLayers": [{"ref": "", "format": "ovfms", "size": 1}]},
    }
    for number, (word, change) in enumerate(changes.items()):
        layout = _layout_with_kernel(bed, kernel, number, **change)
        archive = bed.dir / f"handmade{number}.tar"
        bed.run(["tar", "-C", layout, "-cf", archive, "."])
        words = ("images", "import", "--snapshotter", "ovms", archive)
        done = bed.refused(lambda words=words: bed.containerd.ctr(*words, status=None), word)
        check("layer" in done.text, f"{word}: it was refused, but not at unpacking: {done.text!r}")


def _layout_with_kernel(bed: Bed, kernel: bytes | str, number: int = 0, **changes: object) -> Path:
    """
    A runnable image, descriptor layer included, with any bytes as kernel or with the digest of a kernel that is not there.

    Each number has a disk layer of its own: when an import is refused, containerd collects the layers that were good at
    any time after, and its 1.7 may then have counted on one of them in the next import already.
    """
    name = f"handmade{number}"
    disk = bed.guests.disks[0]
    layout = oci.Layout(bed.dir / name)
    layer = oci.tar([oci.File("ovm/disk.qcow2", disk.read_bytes(), mtime=number)])
    reference = kernel if isinstance(kernel, str) else oci.digest(kernel)
    manifest: dict[str, Any] = {
        "schemaVersion": 1, "mediaType": _MANIFEST, "name": "handmade", "version": "1", "kernel": {"ref": reference, "args": "x"},
        "diskLayers": [{"ref": oci.digest(layer), "format": "qcow2", "size": len(layer)}],
    } | changes
    for listed in manifest["diskLayers"]:
        listed["ref"] = oci.digest(layer)
    descriptor = oci.tar([oci.File("ovm/manifest.json", json.dumps(manifest).encode())])
    config = {"architecture": "amd64", "os": "linux", "config": {"Entrypoint": ["ovms"]},
              "rootfs": {"type": "layers", "diff_ids": [oci.digest(layer), oci.digest(descriptor)]}}
    blobs = [layout.json(manifest, _MANIFEST)]
    if isinstance(kernel, bytes):
        blobs.append(layout.blob(kernel, "application/vnd.ovms.kernel.v1"))
    blobs += [layout.blob(data, "application/vnd.oci.image.layer.v1.tar") for data in (layer, descriptor)]
    layout.manifest(
        {"schemaVersion": 2, "mediaType": oci.MANIFEST, "artifactType": _MANIFEST, "config": layout.json(config, oci.CONFIG),
         "layers": blobs}, f"localhost/{name}:1")
    return layout.directory


def _pull(bed: Bed, ref: str) -> process.Done:
    return bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref, status=None)
