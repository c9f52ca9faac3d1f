#!/usr/bin/env python3
"""Measures every promise of speed and memory beside the floor or peer it is compared with, in one run, and writes
target/bench/report.json. A figure that misses its goal is printed as such; only a measurement that breaks fails.

    run.py [--only GLOB]      measures: start, containerd, memory, ram, debian
    RUNS=N                    counted runs of each command (default 20)
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import report
from bench.measures import containerd, debian, memory, ram, start
from e2e.harness import process, records
from e2e.harness.case import CaseFailed, CaseSkipped

MEASURES = {"start": start.measure, "containerd": containerd.measure, "memory": memory.measure, "ram": ram.measure,
            "debian": debian.measure}


def main() -> int:
    """Runs what is asked for; the exit status says whether every measurement could be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--inside", type=Path, metavar="REPORT", help="this already is the nested host")
    options = parser.parse_args()

    process.heed_sigterm()
    process.become_subreaper()
    if options.inside:
        try:
            records.write(debian.measure_here(), options.inside)
        except CaseFailed as failure:
            print(f"debian: {failure}", flush=True)
            return 1
        return 0
    runs = int(os.environ.get("RUNS", "20"))
    figures: list[report.Figure] = []
    broken = 0
    for name, measure in MEASURES.items():
        if not fnmatch.fnmatch(name, options.only):
            continue
        try:
            for figure in measure(runs):
                report.announce(figure)
                figures.append(figure)
        except CaseSkipped as reason:
            figures.append(report.skipped(name, str(reason)))
            report.announce(figures[-1])
        except CaseFailed as failure:
            print(f"{name}: FAILED: {failure}", flush=True)
            broken += 1
        records.write(figures, report.PATH)
    print(f"report: {report.PATH}")
    missed = [figure.name for figure in figures if figure.holds is False]
    print(f"{len(missed)} of {len(figures)} figures miss their goals" + "".join(f"\n  {name}" for name in missed))
    return 1 if broken or not figures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
