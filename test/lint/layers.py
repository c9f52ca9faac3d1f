"""Compares docs/layers.txt with the crate graph that cargo sees: imports go down only, never sideways."""

import json
import subprocess
import sys
from pathlib import Path

import verdict

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ROOT / "docs" / "layers.txt"


def declared() -> dict[str, tuple[int, set[str]]]:
    """Crate -> (level, crates it may import), as the file says."""
    crates = {}
    for line in LAYERS.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            head, _, imports = line.partition(":")
            level, name = head.split()
            crates[name] = (int(level), set(imports.split()))
    return crates


def actual() -> dict[str, set[str]]:
    """Crate -> crates of ours that it imports, as cargo says; dev-dependencies do not count."""
    out = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--no-deps", "--locked"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout
    packages = json.loads(out)["packages"]
    names = {package["name"] for package in packages}
    return {
        package["name"]: {
            dep["name"] for dep in package["dependencies"] if dep["name"] in names and dep["kind"] != "dev"
        }
        for package in packages
    }


def main() -> int:
    want, have, faults = declared(), actual(), []
    for name in sorted(want.keys() ^ have.keys()):
        faults.append(f"{name} stands in only one of docs/layers.txt and the workspace")
    for name in sorted(want.keys() & have.keys()):
        level, may = want[name]
        for dep in sorted(may):
            if dep not in want:
                faults.append(f"docs/layers.txt lets {name} import {dep}, which is no crate")
            elif want[dep][0] >= level:
                faults.append(f"docs/layers.txt lets {name} (level {level}) import {dep} (level {want[dep][0]})")
        for dep in sorted(have[name] - may):
            faults.append(f"{name} imports {dep}, which docs/layers.txt does not allow")
        for dep in sorted(may - have[name]):
            faults.append(f"docs/layers.txt lets {name} import {dep}, which it does not")
    return verdict.close("layers", faults, f"{len(have)} crates import as docs/layers.txt says")


if __name__ == "__main__":
    sys.exit(main())
