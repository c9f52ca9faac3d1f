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


def _containerd(module: str, version: str) -> GoSet:
    return GoSet(
        f"containerd-{'.'.join(version.removeprefix('v').split('.')[:2])}",
        module,
        version,
        ("cmd/containerd", "cmd/ctr", "cmd/containerd-shim-runc-v2"),
        f"-X {module}/version.Version={version}",
    )


_CONTAINERD_1 = "github.com/containerd/containerd"
_CONTAINERD_2 = f"{_CONTAINERD_1}/v2"

CONTAINERD_2_4 = _containerd(_CONTAINERD_2, "v2.4.2")
CONTAINERD_1_7 = _containerd(_CONTAINERD_1, "v1.7.35")
#: Built only when they are asked for: each takes some two minutes.
CONTAINERD_2_1 = _containerd(_CONTAINERD_2, "v2.1.9")
CONTAINERD_2_3 = _containerd(_CONTAINERD_2, "v2.3.7")
ORAS = GoSet("oras", "oras.land/oras", "v1.3.6", ("cmd/oras",))
NERDCTL = GoSet("nerdctl", "github.com/containerd/nerdctl/v2", "v2.0.4", ("cmd/nerdctl",))

ALL = (CONTAINERD_2_4, CONTAINERD_1_7, ORAS, NERDCTL)
OPTIONAL = (CONTAINERD_2_1, CONTAINERD_2_3)


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
