"""Images whose RAM was changed by somebody who keeps every digest and checksum right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import oci, process
from .bed import Bed
from .ovms import program

_OVMS_MANIFEST = "application/vnd.ovms.manifest.v1+json"


def with_head(pointer: str, value: object) -> Callable[[Path], None]:
    """An edit that sets one field of a blob's head."""
    def edit(blob: Path) -> None:
        out = blob.with_suffix(".edited")
        process.run([program("ovms-ram-edit"), blob, out, pointer, json.dumps(value)])
        out.rename(blob)

    return edit


def head(blob: Path) -> dict[str, Any]:
    """What a blob's head says (docs/ram-snapshot.md)."""
    return head_of(blob.read_bytes())


def head_of(data: bytes) -> dict[str, Any]:
    """The same of a blob in memory."""
    offset, length = (int.from_bytes(data[at:at + 8], "little") for at in (16, 24))
    document: dict[str, Any] = json.loads(data[offset:offset + length])
    return document


def chunks(data: bytes) -> dict[int, bytes]:
    """The chunks of memory that a blob stores: number → the checksum of what they hold."""
    index = head_of(data)["index"]
    table = data[index["offset"]:index["offset"] + index["length"]]
    entries = (table[at:at + 32] for at in range(0, len(table), 32))
    return {int.from_bytes(entry[:4], "little"): entry[16:] for entry in entries}


def image(bed: Bed, ref: str, tag: str, edit: Callable[[Path], None]) -> str:
    """Copies an image of the registry to another tag, its RAM blob edited on the way; returns the new reference."""
    layout = bed.dir / f"forged-{tag}"
    flags = ("--preserve-digests", "--src-tls-verify=false")
    process.run(["skopeo", "--insecure-policy", "copy", *flags, f"docker://{ref}", f"oci:{layout}:{tag}"])
    forge(layout, tag, edit)
    return bed.registry.push(layout, f"forged:{tag}", "--preserve-digests")


def forge(directory: Path, tag: str, edit: Callable[[Path], None]) -> None:
    """Edits the RAM blob of the only image in a layout, and everything that names it."""
    blobs = directory / "blobs/sha256"

    def read(digest: str) -> Any:
        return json.loads((blobs / digest.removeprefix("sha256:")).read_bytes())

    index = json.loads((directory / "index.json").read_text(encoding="ascii"))
    manifest = read(index["manifests"][0]["digest"])
    machine_at = next(layer for layer in manifest["layers"] if layer["mediaType"] == _OVMS_MANIFEST)
    machine = read(machine_at["digest"])
    before = machine["ramSnapshot"]["ref"]
    ram = next(layer for layer in manifest["layers"] if layer["digest"] == before)
    copy = directory / "ram"
    copy.write_bytes((blobs / before.removeprefix("sha256:")).read_bytes())
    edit(copy)
    layout = oci.Layout(directory)
    ram |= layout.blob(copy.read_bytes(), ram["mediaType"])
    copy.unlink()
    machine = json.loads(json.dumps(machine).replace(before, ram["digest"]))
    machine_at |= layout.json(machine, _OVMS_MANIFEST)
    tar = oci.tar([oci.File("ovm/manifest.json", json.dumps(machine, separators=(",", ":")).encode())])
    manifest["layers"][-1] |= layout.blob(tar, manifest["layers"][-1]["mediaType"])
    config = read(manifest["config"]["digest"])
    config["rootfs"]["diff_ids"][-1] = oci.digest(tar)
    manifest["config"] = layout.json(config, manifest["config"]["mediaType"])
    layout.manifest(manifest, tag)
