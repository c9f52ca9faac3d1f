"""A private registry on 127.0.0.1."""

from __future__ import annotations

import json
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from . import oci, process


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Registry:
    """Debian's docker-registry with a store of its own."""

    def __init__(self, directory: Path, patience: float) -> None:
        directory.mkdir()
        self.address = f"127.0.0.1:{free_port()}"
        config = directory / "config.yml"
        config.write_text(
            "version: 0.1\nlog:\n  level: warn\n"
            f"storage:\n  filesystem:\n    rootdirectory: {directory / 'store'}\n"
            f"http:\n  addr: {self.address}\n",
            encoding="ascii",
        )
        self._daemon = process.Daemon("docker-registry", ["docker-registry", "serve", config], directory / "log")
        self._daemon.await_ready(self._answers, patience)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.address}/v2/", timeout=2) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def ref(self, name: str) -> str:
        """The reference of an image of that name and tag in this registry."""
        return f"{self.address}/{name}"

    def push(self, layout: Path, name: str, *options: str) -> str:
        """Copies an OCI layout into the registry with skopeo and returns its reference there."""
        process.run(
            ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", *options, f"oci:{layout}", f"docker://{self.ref(name)}"],
            timeout=300,
        )
        return self.ref(name)

    def manifest(self, ref: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The manifest of an image here, and the descriptor by which others name it."""
        name, _, tag = ref.removeprefix(f"{self.address}/").rpartition(":")
        asked = urllib.request.Request(f"http://{self.address}/v2/{name}/manifests/{tag}", headers={"Accept": oci.MANIFEST})
        with urllib.request.urlopen(asked, timeout=10) as reply:
            raw = reply.read()
        manifest: dict[str, Any] = json.loads(raw)
        return manifest, {"mediaType": manifest["mediaType"], "digest": oci.digest(raw), "size": len(raw)}

    def blob(self, ref: str, digest: str) -> bytes:
        """A blob of an image here."""
        name = ref.removeprefix(f"{self.address}/").rpartition(":")[0]
        with urllib.request.urlopen(f"http://{self.address}/v2/{name}/blobs/{digest}", timeout=30) as reply:
            data: bytes = reply.read()
        return data

    def uploaded(self) -> list[str]:
        """Digests of all blobs that were ever sent, as its access log has them; one that was sent twice is there twice."""
        sent = re.findall(r'"PUT /v2/\S+/blobs/uploads/\S+[?&]digest=(\S+?)[ &]', self._daemon.logged())
        return [urllib.parse.unquote(digest) for digest in sent]

    def stop(self) -> None:
        """Ends it."""
        self._daemon.stop()
