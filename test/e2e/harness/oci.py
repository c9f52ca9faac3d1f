"""Writes ordinary container images as OCI image layouts, since there is no public registry to pull one from."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"

#: pause(2) for ever: `mov eax, 34; syscall; jmp` back to the first instruction.
_PAUSE_CODE = bytes.fromhex("b822000000" "0f05" "ebf7")


def digest(data: bytes) -> str:
    """The OCI digest of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


@dataclass
class File:
    """A file, or a symbolic link, of a layer."""

    path: str
    data: bytes = b""
    mode: int = 0o644
    link: str = ""
    mtime: int = 0


@dataclass
class Image:
    """An image to be written."""

    name: str
    layers: list[list[File]]
    entrypoint: list[str]
    env: list[str] = field(default_factory=lambda: ["PATH=/bin"])


def tar(files: list[File]) -> bytes:
    """A tar of the files and of the directories they need; equal files give equal bytes."""
    out = io.BytesIO()
    made: set[str] = set()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for file in files:
            parts = file.path.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                directory = "/".join(parts[:depth])
                if directory not in made:
                    made.add(directory)
                    info = tarfile.TarInfo(directory)
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(info)
            info = tarfile.TarInfo(file.path)
            info.mode, info.mtime = file.mode, file.mtime
            if file.link:
                info.type, info.linkname = tarfile.SYMTYPE, file.link
                archive.addfile(info)
            else:
                info.size = len(file.data)
                archive.addfile(info, io.BytesIO(file.data))
    return out.getvalue()


class Layout:
    """An OCI image layout under construction."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs/sha256"
        self._blobs.mkdir(parents=True, exist_ok=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}', encoding="ascii")
        self._index: list[dict[str, Any]] = []

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        """Adds a blob and returns its descriptor."""
        name = digest(data)
        (self._blobs / name.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": media_type, "digest": name, "size": len(data)}

    def json(self, value: Any, media_type: str) -> dict[str, Any]:
        """Adds a JSON blob."""
        return self.blob(json.dumps(value, separators=(",", ":")).encode(), media_type)

    def manifest(self, value: dict[str, Any], tag: str) -> None:
        """Adds a manifest and lists it in the index under `tag`."""
        descriptor = self.json(value, MANIFEST)
        descriptor["annotations"] = {"org.opencontainers.image.ref.name": tag, "io.containerd.image.name": tag}
        self._index.append(descriptor)
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self._index}
        (self.directory / "index.json").write_text(json.dumps(index), encoding="ascii")


def write(image: Image, directory: Path) -> Path:
    """Writes an ordinary image with gzipped layers."""
    layout = Layout(directory)
    layers, diff_ids = [], []
    for files in image.layers:
        plain = tar(files)
        diff_ids.append(digest(plain))
        layers.append(layout.blob(gzip.compress(plain, mtime=0), LAYER_GZIP))
    config = {
        "architecture": "amd64", "os": "linux",
        "config": {"Entrypoint": image.entrypoint, "Env": image.env, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    layout.manifest(
        {"schemaVersion": 2, "mediaType": MANIFEST, "config": layout.json(config, CONFIG), "layers": layers}, image.name
    )
    return directory


def busybox() -> Image:
    """Busybox in two layers; the second overrides a file of the first and deletes another."""
    binary = Path("/bin/busybox").read_bytes()
    applets = ("cat", "echo", "false", "ls", "sh", "sleep", "touch", "true", "wc")
    return Image(
        "localhost/busybox:1",
        [
            [File("bin/busybox", binary, 0o755), *(File(f"bin/{name}", link="busybox") for name in applets),
             File("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"),
             File("etc/group", b"root:x:0:\nuser:x:1000:\n"), File("etc/layer", b"first\n"), File("etc/gone", b"here\n")],
            [File("etc/layer", b"second\n"), File("etc/.wh.gone")],
        ],
        ["/bin/sh"],
    )


def pause() -> Image:
    """What Kubernetes calls the pause image: one static program that waits for ever."""
    base = 0x400000
    size = 64 + 56
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01".ljust(16, b"\0"), 2, 62, 1, base + size, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size + len(_PAUSE_CODE), size + len(_PAUSE_CODE), 0x1000)
    return Image("localhost/pause:1", [[File("pause", header + segment + _PAUSE_CODE, 0o755)]], ["/pause"], [])
