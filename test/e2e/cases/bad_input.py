"""Bad input gets a clear error at the earliest point and leaves nothing half-made."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from e2e.harness import oci
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
    bed.refused(bed.ovms.ovm("build", "-f", manifest, "-o", out, status=None), *wanted)
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
    _build_is_refused(bed, _manifest(bed, kernel={"ref": str(text), "args": ""}), "kernel")


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
    _build_is_refused(bed, _manifest(bed, diskLayers=[{"ref": str(text), "format": "qcow2", "size": 8000}]), "qcow2")


@case(vm=False, guests=("native",), containerds=())
def validate_finds_a_changed_blob(bed: Bed) -> None:
    """A blob whose bytes are not those of its digest is found and named."""
    layout = bed.dir / "layout"
    shutil.copytree(bed.guests.layout("poweroff"), layout)
    blob = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    with open(blob, "r+b") as file:
        file.seek(100)
        file.write(b"\xff\xfe\xfd\xfc")

    bed.refused(bed.ovms.ovm("validate", layout, status=None), blob.name[:12])


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

    done = bed.containerd.ctr("images", "import", "--snapshotter", "ovms", archive, status=None)

    check(done.status != 0, "the import went through")
    _no_snapshots(bed)


@case(guests=("native",))
def a_raw_blob_without_its_annotation(bed: Bed) -> None:
    """A raw disk under the tar type that lost its annotation is refused at pull, with the way out."""
    ref = push_with_oras(bed, "vm:1", format_annotation=False)

    done = bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref, status=None)

    bed.refused(done, "ovms.format", "preserve-digests")
    _no_snapshots(bed)


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

    done = bed.containerd.ctr("images", "import", "--snapshotter", "ovms", archive, status=None)

    bed.refused(done, "backing")
    _no_snapshots(bed)


@case(guests=("native",))
def a_pure_artifact(bed: Bed) -> None:
    """A pure `oras push` artifact cannot become a container; the error says that `ovm pull` makes it runnable."""
    ref = push_with_oras(bed, "vm:1", config=False)
    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref, status=None)

    done = bed.vm(ref, "vm", "--rm", status=None)

    # containerd itself refuses before anything of ours is asked, so its own words are all there can be from it.
    check(done.status != 0, "it ran")
    bed.nothing_half_made()
    layout = bed.dir / "pure"
    bed.run(["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", f"docker://{ref}", f"oci:{layout}:1"])
    bed.refused(bed.ovms.ovm("run", layout, status=None), "ovm pull")


@case(guests=("native",))
def a_kernel_blob_that_is_missing(bed: Bed) -> None:
    """A manifest whose kernel is not among the image's blobs is refused by its digest."""
    nowhere = "sha256:" + "ab" * 32
    layout = _layout_with_kernel(bed, nowhere)

    bed.refused(bed.ovms.ovm("validate", layout, status=None), "kernel")
    image = bed.import_for_ovms(layout)
    bed.refused(bed.vm(image, "vm", "--rm", status=None), nowhere[:19])
    bed.nothing_half_made()


@case(guests=("native",))
def a_kernel_that_is_none(bed: Bed) -> None:
    """An image whose kernel blob is a text is refused when the machine is created."""
    layout = _layout_with_kernel(bed, b"this is no kernel\n" * 1000)
    image = bed.import_for_ovms(layout)

    bed.refused(bed.vm(image, "vm", "--rm", status=None), "kernel")
    bed.nothing_half_made()


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

    bed.refused(bed.vm(image, "vm", "--rm", "--annotation", "io.ovms.memory=48M", status=None), "initrd", "memory")
    bed.nothing_half_made()


@case(guests=("native",))
def appended_arguments_too_long(bed: Bed) -> None:
    """An annotation that makes the command line too long is refused when the machine is created."""
    image = bed.import_vm("poweroff")

    done = bed.vm(image, "vm", "--rm", "--annotation", f"io.ovms.kernel-args={'x' * 70_000}", status=None)

    bed.refused(done, "command line")
    bed.nothing_half_made()


@case(guests=("native",))
def annotations_that_make_no_sense(bed: Bed) -> None:
    """A number of vCPUs that is none, and memory that is none, are refused by the annotation's name."""
    image = bed.import_vm("poweroff")

    for name, value in (("io.ovms.vcpus", "many"), ("io.ovms.vcpus", "0"), ("io.ovms.memory", "-1"), ("io.ovms.memory", "12 apples")):
        done = bed.vm(image, "vm", "--rm", "--annotation", f"{name}={value}", status=None)
        bed.refused(done, name)
        bed.containerd.ctr("containers", "delete", "vm", status=None)
    bed.nothing_half_made()


@case(guests=("native",))
def no_kvm_device(bed: Bed) -> None:
    """Without the hypervisor's device the error names it."""
    image = bed.import_vm("poweroff")
    bed.ovms.write_settings(kvm="/dev/no-such-kvm")

    bed.refused(bed.vm(image, "vm", "--rm", status=None), "/dev/no-such-kvm")
    bed.nothing_half_made()


@case(guests=("native",))
def a_kvm_device_that_is_another(bed: Bed) -> None:
    """A device that cannot be opened is named too."""
    image = bed.import_vm("poweroff")
    node = bed.dir / "kvm"
    # No driver has this number.
    os.mknod(node, 0o600 | 0o020000, os.makedev(10, 250))
    bed.ovms.write_settings(kvm=str(node))

    bed.refused(bed.vm(image, "vm", "--rm", status=None), str(node))
    bed.nothing_half_made()


@case(guests=("native",))
def the_snapshotter_is_down(bed: Bed) -> None:
    """A start while the snapshotter is down fails with its socket's name."""
    image = bed.import_vm("poweroff")
    bed.ovms.stop_snapshotter()

    done = bed.vm(image, "vm", "--rm", status=None)

    bed.refused(done, ".sock")
    bed.nothing_half_made()


@case(guests=("native",))
def a_root_that_overlayfs_made(bed: Bed) -> None:
    """An image unpacked by overlayfs is refused with what to add to the command."""
    layout = bed.guests.layout("poweroff")
    bed.containerd.import_layout(layout, "--snapshotter", "overlayfs")
    image = next(name for name in bed.image_names() if not name.startswith("import-"))

    done = bed.containerd.ctr("run", "--rm", "--snapshotter", "overlayfs", "--runtime", RUNTIME, image, "vm", status=None)

    bed.refused(done, "--snapshotter ovms")
    bed.nothing_half_made()


@case(guests=("native",))
def an_ordinary_image_under_our_runtime(bed: Bed) -> None:
    """busybox under io.containerd.ovms.v1 is refused in plain words."""
    image = bed.import_for_ovms(bed.ordinary(oci.busybox()))

    bed.refused(bed.vm(image, "vm", "--rm", status=None), "ordinary container image")
    bed.nothing_half_made()


@case(guests=("native",))
def a_disk_in_use(bed: Bed) -> None:
    """A second machine on the writable disk of a running one is refused with the first one's name."""
    bed.detached("wait")

    done = bed.run([REPO / "target/e2e/samedisk", bed.containerd.socket, bed.namespace, "vm", "vm2"], status=None)

    bed.refused(done, "in use", "vm")
    check(bed.containerd.tasks() == {"vm": "RUNNING"}, f"tasks: {bed.containerd.tasks()}")


@case(guests=("native",))
def without_our_differ_a_raw_blob_says_which_line_is_missing(bed: Bed) -> None:
    """Raw blobs need our differ; with the walking one the pull fails and nothing is left."""
    bed.ovms.start_snapshotter()
    bed.__dict__["containerd"] = bed.start_containerd("c", without_our_differ(bed.ovms.snippet(bed.release)))
    ref = push_with_oras(bed, "vm:1")

    done = bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref, status=None)

    check(done.status != 0, "the pull went through")
    _no_snapshots(bed)


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
        done = bed.containerd.ctr("images", "import", "--snapshotter", "ovms", archive, status=None)
        if done.status == 0:
            done = bed.vm(f"localhost/handmade{number}:1", "vm", "--rm", status=None)
        bed.refused(done, word)
    bed.nothing_half_made()


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


def _no_snapshots(bed: Bed) -> None:
    """Checks that no committed snapshot is left of an image that was refused."""
    lines = bed.containerd.ctr("snapshots", "--snapshotter", "ovms", "ls").out.splitlines()[1:]
    committed = [line for line in lines if "Committed" in line]
    check(not committed, f"snapshots are left: {committed}")
