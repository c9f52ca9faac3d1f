"""`ctr run --rm` of a machine that powers off at once, beside runc with `true` under the same containerd."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

from bench.measures.beds import native_bed
from bench.report import Figure, compared
from e2e.harness import oci


def measure(runs: int) -> Iterator[Figure]:
    """The two in turns, so that both see the same machine weather."""
    with native_bed() as bed:
        containerd = bed.containerd
        containerd.import_layout(bed.ordinary(oci.busybox()))
        ordinary = bed.image_names()[0]
        machine = bed.import_vm("poweroff")
        ours, theirs = [], []
        # The first pair unpacks and warms up, and is not counted.
        for run in range(runs + 1):
            pair = (
                _timed(lambda run=run: bed.vm(machine, f"vm{run}", "--rm")),
                _timed(lambda run=run: containerd.ctr("run", "--rm", ordinary, f"runc{run}", "/bin/true")),
            )
            if run:
                ours.append(pair[0])
                theirs.append(pair[1])
    yield compared("ctr run --rm of a machine that powers off at once", statistics.median(ours), "ms",
                   "runc with true", statistics.median(theirs), 1.2)


def _timed(body: Callable[[], object]) -> float:
    began = time.perf_counter()
    body()
    return (time.perf_counter() - began) * 1000
