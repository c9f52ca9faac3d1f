"""Builds the real programs that ovms is tested with, from pinned Go modules.

Every program is linked statically, so that the same file runs on this host and in the nested one.
A set is one module of our own which requires exactly one upstream version: `go install
path@version` refuses modules whose go.mod holds excludes or replaces.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import cache


@dataclass(frozen=True)
class GoSet:
    """Programs from one upstream module at one version."""

    name: str
    module: str
    version: str
    programs: tuple[str, ...]
    ldflags: str = ""


CONTAINERD_2 = GoSet(
    "containerd-2.4",
    "github.com/containerd/containerd/v2",
    "v2.4.2",
    ("cmd/containerd", "cmd/ctr", "cmd/containerd-shim-runc-v2"),
    "-X github.com/containerd/containerd/v2/version.Version=v2.4.2",
)
CONTAINERD_1 = GoSet(
    "containerd-1.7",
    "github.com/containerd/containerd",
    "v1.7.35",
    ("cmd/containerd", "cmd/ctr", "cmd/containerd-shim-runc-v2"),
    "-X github.com/containerd/containerd/version.Version=v1.7.35",
)
ORAS = GoSet("oras", "oras.land/oras", "v1.3.6", ("cmd/oras",))
NERDCTL = GoSet("nerdctl", "github.com/containerd/nerdctl/v2", "v2.0.4", ("cmd/nerdctl",))

ALL = (CONTAINERD_2, CONTAINERD_1, ORAS, NERDCTL)


def _build(spec: GoSet, out: Path) -> None:
    source = out / "src"
    source.mkdir()
    version = _go("env", "GOVERSION").removeprefix("go")
    (source / "go.mod").write_text(
        f"module ovms.test/{spec.name}\n\ngo {version}\n\nrequire {spec.module} {spec.version}\n",
        encoding="ascii",
    )
    env = os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-mod=mod -buildvcs=false"}
    for program in spec.programs:
        cache.say(f"building {Path(program).name} of {spec.name}")
        subprocess.run(
            ["nice", "go", "build", "-trimpath", "-ldflags", f"-s -w {spec.ldflags}",
             "-o", str(out / Path(program).name), f"{spec.module}/{program}"],
            cwd=source, env=env, check=True,
        )


def _go(*args: str) -> str:
    return subprocess.run(["go", *args], check=True, text=True, capture_output=True).stdout.strip()


def directory(spec: GoSet) -> Path:
    """The directory that holds the set's programs, built if need be."""
    key = cache.recipe_key("1", repr(spec))
    return cache.entry(spec.name, key, lambda out: _build(spec, out))
