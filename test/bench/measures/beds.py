"""Test beds for measurements: those of the end-to-end cases, closed whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from e2e.harness import places
from e2e.harness.bed import Bed
from e2e.harness.case import CaseFailed, CaseSkipped
from e2e.harness.guests import Guests


@contextlib.contextmanager
def native_bed() -> Iterator[Bed]:
    """A bed with bare-metal guests on this machine's /dev/kvm."""
    if reason := places.unusable("native") or places.without_kvm():
        raise CaseSkipped(reason)
    guests = Guests("native", "/tmp")
    bed = Bed("containerd-2.4", guests, 15.0, "/tmp")
    try:
        bed.ovms.put_runtime_on_tmpfs()
        yield bed
    finally:
        wrong = bed.close()
        guests.close()
        if wrong:
            raise CaseFailed("; ".join(wrong))
