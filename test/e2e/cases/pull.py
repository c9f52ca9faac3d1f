"""Images of machines on their way from a builder through registries into containerd."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from e2e.harness import oci, process
from e2e.harness.bed import Bed
from e2e.harness.case import case, check, contains
from e2e.harness.guests import DIFF_LINE
from testbed import gotools

_MANIFEST = "application/vnd.ovms.manifest.v1+json"
#: Layers of the deepest disk.
_DEPTH = 128
#: Sector 0 of a raw disk, and its size in bytes.
_RAW_LINE = "a raw disk, all by itself"
_RAW_SIZE = 64 << 20


@case()
def import_and_run(bed: Bed) -> None:
    """An image written by `ovm build` imports and boots; its guest reads what only the diff layer has."""
    image = bed.import_vm("disk")

    done = bed.vm(image, "vm", "--rm")

    contains(done.out, DIFF_LINE, "the guest's console")


@case(guests=("native",))
def import_of_a_tar(bed: Bed) -> None:
    """`ovm build -o FILE.tar` writes what `ctr images import` takes as it is."""
    archive = bed.dir / "image.tar"
    bed.guests.build("poweroff", archive, name="fromtar")

    bed.containerd.ctr("images", "import", "--snapshotter", "ovms", archive)

    names = [name for name in bed.image_names() if not name.startswith("import-")]
    check(names, "the tar was imported under no name")
    done = bed.vm(names[0], "vm", "--rm")
    contains(done.out, bed.guests.ready("poweroff"), "the guest's console")


@case()
def pull_and_run(bed: Bed) -> None:
    """Pushed to a registry with its media types as they are, pulled and run."""
    ref = bed.registry.push(bed.guests.layout("disk"), "vm:1", "--preserve-digests")

    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref)

    contains(bed.vm(ref, "vm", "--rm").out, DIFF_LINE, "the guest's console")


@case(guests=("native",))
def pull_client_side_and_run(bed: Bed) -> None:
    """The same through the older, client-side pull, which unpacks without any label."""
    ref = bed.registry.push(bed.guests.layout("disk"), "vm:1", "--preserve-digests")

    bed.containerd.ctr("images", "pull", "--local", "--plain-http", "--snapshotter", "ovms", ref)

    contains(bed.vm(ref, "vm", "--rm").out, DIFF_LINE, "the guest's console")


@case(guests=("native",))
def pushed_by_containerd_itself(bed: Bed) -> None:
    """`ctr images push` of an imported image and a pull into another containerd."""
    image = bed.import_vm("disk")
    ref = bed.registry.ref("vm:1")
    bed.containerd.ctr("images", "tag", image, ref)
    bed.containerd.ctr("images", "push", "--plain-http", ref)
    bed.containerd.ctr("images", "rm", "--sync", ref, image)

    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref)

    contains(bed.vm(ref, "vm", "--rm").out, DIFF_LINE, "the guest's console")


@case()
def skopeo_in_and_out(bed: Bed) -> None:
    """skopeo gzips the layers and drops artifactType and annotations on the way; the image still runs."""
    inside = bed.registry.push(bed.guests.layout("disk"), "vm:1")
    outside = bed.dir / "copied"
    process.run(["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", f"docker://{inside}", f"oci:{outside}:vm"], timeout=300)
    before, manifest = _manifest_of(bed.guests.layout("disk")), _manifest_of(outside)
    layers = [layer for layer in _all_layers(manifest) if "image.layer" in layer["mediaType"]]
    for layer in layers:
        blob = (outside / "blobs/sha256" / layer["digest"].removeprefix("sha256:")).read_bytes()
        check(layer["mediaType"] == oci.LAYER_GZIP and blob[:2] == b"\x1f\x8b", f"skopeo has not gzipped {layer}")
    check(len(layers) == 3, f"there are {len(layers)} layers")
    annotated = [layer for layer in _all_layers(before) if layer.get("annotations")]
    check("artifactType" in before and annotated, f"there was nothing to drop: {before}")
    # Debian bookworm's skopeo (1.9) drops them; trixie's, in the nested host, keeps them.
    kept = [layer for layer in _all_layers(manifest) if layer.get("annotations")]
    check(not bed.guests.native or ("artifactType" not in manifest and not kept), f"skopeo has kept what it is to drop: {manifest}")

    ref = bed.registry.push(outside, "vm:2")
    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref)

    contains(bed.vm(ref, "vm", "--rm").out, DIFF_LINE, "the guest's console")


@case()
def oras_push_with_config(bed: Bed) -> None:
    """An image put together with `oras push --config`, raw blobs under the tar type and no descriptor layer, runs."""
    ref = push_with_oras(bed, "vm:1")

    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref)

    contains(bed.vm(ref, "vm", "--rm").out, DIFF_LINE, "the guest's console")


@case()
def an_index_within_an_index(bed: Bed) -> None:
    """An image without a descriptor layer is found where indexes nest, beside one for another platform."""
    image = push_with_oras(bed, "vm:1")
    _, ours = bed.registry.manifest(image)
    _, other = bed.registry.manifest(bed.registry.push(bed.guests.layout("disk"), "vm:2"))
    inner = _push_index(bed, "vm:inner", [ours | {"platform": {"os": "linux", "architecture": "amd64"}}])
    _push_index(bed, "vm:all", [other | {"platform": {"os": "linux", "architecture": "arm64"}}, inner])
    ref = bed.registry.ref("vm:all")

    bed.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "ovms", ref)

    contains(bed.vm(ref, "vm", "--rm").out, DIFF_LINE, "the guest's console")


@case()
def applied_by_the_walking_differ(bed: Bed) -> None:
    """With our differ not configured, containerd's own unpacks the layers into our snapshots; the image still runs."""
    bed.ovms.start_snapshotter()
    bed.configure_containerd(without_our_differ(bed.ovms.snippet(bed.release)))

    image = bed.import_vm("disk")

    contains(bed.vm(image, "vm", "--rm").out, DIFF_LINE, "the guest's console")


@case(guests=("native",))
def one_disk_and_two_kernels(bed: Bed) -> None:
    """Two images that share their disk layers and differ in the kernel keep their own kernels."""
    disks, first, second = bed.guests.disks, bed.guests.layout("poweroff"), bed.guests.layout("reset")
    check(len(disks) == 2 and _layers_of(first)[:2] == _layers_of(second)[:2], "the images do not share their disks")

    one, two = bed.import_for_ovms(first), bed.import_for_ovms(second)

    contains(bed.vm(one, "vm1", "--rm").out, bed.guests.ready("poweroff"), "the first guest's console")
    contains(bed.vm(two, "vm2", "--rm").out, bed.guests.ready("reset"), "the second guest's console")


@case(guests=("native",))
def one_image_with_other_arguments(bed: Bed) -> None:
    """Two images that differ in nothing but the kernel's arguments boot with their own."""
    first, second = bed.import_vm("poweroff"), bed.import_vm("poweroff", extra_args="marked=2", name="marked")

    check("marked=2" not in bed.vm(first, "vm1", "--rm").out, "the first guest has the second one's arguments")
    contains(bed.vm(second, "vm2", "--rm").out, "marked=2", "the second guest's console")


@case(guests=("native",))
def depth_of_many_layers(bed: Bed) -> None:
    """A disk of 128 layers is unpacked and read whole."""
    base, diff = bed.guests.disks
    parts = bed.guests.parts("disk")
    disks = [flag for disk in [base, *[diff] * (_DEPTH - 1)] for flag in ("--disk", str(disk))]
    layout = bed.dir / "deep"
    bed.ovms.ovm("build", "--kernel", parts.kernel, *disks, "--args", parts.args, "--name", "deep", "--version", "1", "-o", layout)

    image = bed.import_for_ovms(layout)

    contains(bed.vm(image, "vm", "--rm").out, DIFF_LINE, "the guest's console")


@case(guests=("native",))
def a_raw_disk_boots(bed: Bed) -> None:
    """A sparse raw file as the disk's only layer, wrapped in a tar or bare: the guest reads it, and its holes stay holes."""
    disk = bed.dir / "disk.raw"
    with open(disk, "wb") as file:
        file.write(_RAW_LINE.encode().ljust(512, b"\0"))
        file.truncate(_RAW_SIZE)
        file.seek(_RAW_SIZE - 512)
        file.write(b"the last sector".ljust(512, b"\0"))
    parts = bed.guests.parts("disk")
    for name, flags in (("wrapped", ()), ("bare", ("--raw-layers",))):
        layout = bed.dir / name
        bed.ovms.ovm("build", "--kernel", parts.kernel, "--disk", disk, "--args", parts.args, "--name", name, "--version", "1",
                     "--tag", f"localhost/{name}:1", *flags, "-o", layout)
        blob = layout / "blobs/sha256" / _layers_of(layout)[0].removeprefix("sha256:")
        if flags:
            check(blob.stat().st_size == _RAW_SIZE, f"the bare layer has {blob.stat().st_size} bytes")
        else:
            contains(process.run(["tar", "-tf", blob]).out, "ovm/disk.raw\n", "the wrapped layer")

        console = bed.vm(bed.import_for_ovms(layout), name, "--rm").out

        contains(console, f"sector 0: {_RAW_LINE}", f"the console of the guest with a {name} disk")
        contains(console, "disk good", f"the console of the guest with a {name} disk")
        data = [path for path in bed.ovms.state.glob("s/*/layer/data") if path.stat().st_size == _RAW_SIZE]
        check(data, f"no layer has the disk's {_RAW_SIZE} bytes")
        used = max(path.stat().st_blocks * 512 for path in data)
        check(0 < used <= 1 << 20, f"a layer of two sectors takes {used} bytes")


@case(guests=("native",))
def commit_of_a_disk_gives_a_block_diff(bed: Bed) -> None:
    """`ctr snapshots diff` of a machine's disk gives one small layer, and this layer holds the write."""
    image = bed.import_vm("disk")
    # The guest writes a pattern to the sector that the argument names.
    bed.vm(image, "vm", "--annotation", "io.ovms.kernel-args=sector=0")

    parent = bed.containerd.ctr("snapshots", "--snapshotter", "ovms", "info", "vm").out
    name = json.loads(parent)["Parent"]
    layer = bed.dir / "layer.tar"
    bed.containerd.snapshot_diff(layer, name, "vm")

    listed = process.run(["tar", "-taf", layer]).out.split()
    check("ovm/disk.qcow2" in listed and "ovm/manifest.json" in listed, f"the layer holds {listed}")
    check(layer.stat().st_size < 1 << 20, f"the layer has {layer.stat().st_size} bytes")
    process.run(["tar", "-C", bed.dir, "-xaf", layer, "ovm/disk.qcow2"])
    process.run(["qemu-img", "check", bed.dir / "ovm/disk.qcow2"])
    raw = bed.dir / "raw"
    process.run(["qemu-img", "convert", "-O", "raw", bed.dir / "ovm/disk.qcow2", raw])
    pattern = bytes((i * 7 + 3) & 0xFF for i in range(512))
    check(raw.read_bytes()[:512] == pattern, "the layer does not hold what the guest wrote")


@case(guests=("native",))
def committed_disk_runs_again(bed: Bed) -> None:
    """The diff of a machine's disk, put on top of its image as one more layer, applies and boots with the write in it."""
    image = bed.import_vm("disk")
    bed.vm(image, "vm", "--annotation", "io.ovms.kernel-args=sector=0")
    layer = bed.dir / "layer.tar.gz"
    bed.containerd.snapshot_diff(layer, "vm")

    committed = bed.import_for_ovms(_with_layer(bed.guests.layout("disk"), layer.read_bytes(), bed.dir / "committed"))
    console = bed.vm(committed, "vm2", "--rm").out

    check(DIFF_LINE not in console, "the second guest reads what the first one has overwritten")
    # Bytes 7 to 14 of the pattern that the guest writes.
    contains(console, "4;BIPW^e", "the second guest's console")


def _with_layer(layout: Path, blob: bytes, to: Path) -> Path:
    """A copy of an image with one more gzipped layer, as a commit makes it."""
    image = json.loads(json.dumps(_manifest_of(layout)))
    config = json.loads((layout / "blobs/sha256" / image["config"]["digest"].removeprefix("sha256:")).read_text())
    config["rootfs"]["diff_ids"].append(oci.digest(gzip.decompress(blob)))
    shutil.copytree(layout, to)
    written = oci.Layout(to)
    image["config"] = written.json(config, oci.CONFIG)
    image["layers"].append(written.blob(blob, oci.LAYER_GZIP))
    written.manifest(image, "localhost/committed:1")
    return to


def push_with_oras(bed: Bed, name: str, *, format_annotation: bool = True, config: bool = True) -> str:
    """Pushes kernel, initrd, disks and manifest as single blobs, the way the specification's examples do."""
    parts = bed.guests.parts("disk")
    scratch = bed.dir / "oras"
    scratch.mkdir()
    files: list[tuple[Path, str]] = [(parts.kernel, "application/vnd.ovms.kernel.v1")]
    if parts.initrd:
        files.append((parts.initrd, "application/vnd.ovms.initrd.v1"))
    files += [(disk, "application/vnd.oci.image.layer.v1.tar") for disk in parts.disks]
    words: list[str] = []
    digests: dict[Path, str] = {}
    annotations: dict[str, dict[str, str]] = {}
    for file, media_type in files:
        data = file.read_bytes()
        digests[file] = oci.digest(data)
        (scratch / file.name).write_bytes(data)
        words.append(f"{file.name}:{media_type}")
        if file in parts.disks and format_annotation:
            annotations[file.name] = {"ovms.format": "qcow2"}
    manifest = {
        "schemaVersion": 1, "mediaType": _MANIFEST, "name": "oras", "version": "1",
        "kernel": {"ref": digests[parts.kernel], "args": parts.args},
        "diskLayers": [{"ref": digests[disk], "format": "qcow2", "size": disk.stat().st_size} for disk in parts.disks],
    }
    if parts.initrd:
        manifest["initrd"] = {"ref": digests[parts.initrd]}
    (scratch / "manifest.json").write_text(json.dumps(manifest), encoding="ascii")
    image_config = {
        "architecture": "amd64", "os": "linux", "config": {"Entrypoint": ["ovms"]},
        "rootfs": {"type": "layers", "diff_ids": [digests[disk] for disk in parts.disks]},
    }
    (scratch / "config.json").write_text(json.dumps(image_config), encoding="ascii")
    (scratch / "annotations.json").write_text(json.dumps(annotations), encoding="ascii")
    ref = bed.registry.ref(name)
    options = ["--config", f"config.json:{oci.CONFIG}"] if config else ["--artifact-type", _MANIFEST]
    process.run(
        [_oras(), "push", "--plain-http", "--annotation-file", "annotations.json", *options, ref,
         f"manifest.json:{_MANIFEST}", *words],
        cwd=scratch, timeout=300,
    )
    return ref


def _oras() -> Path:
    return gotools.directory(gotools.ORAS) / "oras"


def _push_index(bed: Bed, name: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Pushes an image index and returns its descriptor."""
    index = {"schemaVersion": 2, "mediaType": oci.INDEX, "manifests": entries}
    file = bed.dir / "index.json"
    file.write_text(json.dumps(index), encoding="ascii")
    process.run([_oras(), "manifest", "push", "--plain-http", "--media-type", oci.INDEX, bed.registry.ref(name), file])
    data = file.read_bytes()
    return {"mediaType": oci.INDEX, "digest": oci.digest(data), "size": len(data)}


def without_our_differ(snippet: str) -> str:
    """The shipped configuration with containerd's walking differ in the place of ours."""
    walking = snippet.replace('differ = "ovms-diff"', 'differ = "walking"')
    return walking.replace('default = ["ovms-diff", "walking"]', 'default = ["walking"]')


def _manifest_of(layout: Path) -> dict[str, object]:
    index = json.loads((layout / "index.json").read_text(encoding="utf-8"))
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    manifest: dict[str, object] = json.loads((layout / "blobs/sha256" / digest).read_text(encoding="utf-8"))
    return manifest


def _all_layers(manifest: dict[str, object]) -> list[dict[str, Any]]:
    layers = manifest["layers"]
    assert isinstance(layers, list)
    return layers


def _layers_of(layout: Path) -> list[str]:
    return [layer["digest"] for layer in _all_layers(_manifest_of(layout)) if "image.layer" in layer["mediaType"]]
