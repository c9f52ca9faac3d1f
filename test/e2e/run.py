#!/usr/bin/env python3
"""Runs the end-to-end cases and writes target/e2e/report.json.

    E2E=native|nested|direct|auto   where (auto: the best the host offers)
    CASE='GLOB ...'                 only the cases whose name matches one of them
    CONTAINERD='2.3 2.1'            on these releases of containerd instead of 2.4 and 1.7
    run.py --list                   prints the names

Native cases boot bare-metal guests on any /dev/kvm, direct ones an unmodified Debian on a host with
svm or vmx, nested ones the same Debian inside an emulated host that is started for the purpose.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from e2e import cases
from e2e.harness import containerd, places, process, report, runner


def main() -> int:
    """Runs what is asked for; the exit status says whether all of it passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--where", default=os.environ.get("E2E") or "auto", choices=["auto", *places.NAMES])
    parser.add_argument("--case", default=os.environ.get("CASE") or "*", metavar="GLOB")
    parser.add_argument("--report", type=Path, default=report.DIRECTORY / "report.json")
    parser.add_argument("--inside", action="store_true", help="this already is the nested host")
    options = parser.parse_args()

    process.heed_sigterm()
    cases.load()
    if options.list:
        for name in runner.names():
            print(name)
        return 0
    if unknown := set(runner.containerds()) - set(containerd.RELEASES):
        parser.error(f"there is no {', '.join(sorted(unknown))} to test with, only {', '.join(containerd.RELEASES)}")
    results = runner.run_everywhere(options.where, options.case, options.inside, options.report)
    return report.close(results, options.report, quiet=options.inside)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
