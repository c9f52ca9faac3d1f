"""`make install` and `make uninstall`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from e2e.harness.bed import Bed
from e2e.harness.case import case, check
from e2e.harness.ovms import PROGRAMS, REPO, binaries

_PREFIX = "/opt/ovms"


@case(vm=False, guests=("native",), containerds=(), seconds=60)
def installed_files_fit_each_other(bed: Bed) -> None:
    """Units start the installed program on the sockets that the snippets name; uninstall leaves the settings alone."""
    root = bed.dir / "root"
    _make(bed, "install", root)

    for name in PROGRAMS:
        check((root / _PREFIX[1:] / "bin" / name).stat().st_mode & 0o111, f"{name} cannot be executed")
    units = {unit.name: unit.read_text(encoding="utf-8") for unit in (root / "lib/systemd/system").iterdir()}
    started = re.findall(r"^ExecStart=(\S+)", units["ovms-snapshotter.service"], re.M)
    check(started == [f"{_PREFIX}/bin/ovms-snapshotter"], f"the service starts {started}")
    listened = {path for text in units.values() for path in re.findall(r"^ListenStream=(\S+)", text, re.M)}
    check(listened == {_default("snapshotter_socket"), _default("bundle_socket")}, f"the units listen on {listened}")
    for snippet in (root / _PREFIX[1:] / "share/ovms").glob("*.toml"):
        plugins = tomllib.loads(snippet.read_text(encoding="utf-8"))["proxy_plugins"]
        addresses = {plugin["address"] for plugin in plugins.values()}
        check(addresses == {_default("snapshotter_socket")}, f"{snippet.name} names {addresses}")

    settings = root / "etc/ovms/ovms.toml"
    settings.write_text("# mine\n", encoding="utf-8")
    _make(bed, "install", root)
    check(settings.read_text(encoding="utf-8") == "# mine\n", "a second install overwrote the settings")
    _make(bed, "uninstall", root)
    left = [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    check(left == ["etc/ovms/ovms.toml"], f"uninstall left {left}")


def _make(bed: Bed, target: str, root: Path) -> None:
    # What is built is taken as it is.
    bed.run(["make", "-s", "-C", REPO, "-o", "build", target, f"DESTDIR={root}", f"PREFIX={_PREFIX}", f"BUILT={binaries()}"])


def _default(key: str) -> str:
    """A default of the shipped settings, which show it in a comment."""
    text = (REPO / "config/ovms.toml").read_text(encoding="utf-8")
    return re.findall(rf'^#= {key} = "(.*)"$', text, re.M)[0]
