"""containerd's own snapshotter suite."""

from __future__ import annotations

from e2e.harness import process
from e2e.harness.bed import Bed
from e2e.harness.case import CaseFailed, case, check
from e2e.harness.ovms import REPO

_SUITE = REPO / "target/e2e/snapshotter-suite"


@case(vm=False, guests=("native",), containerds=(), seconds=240)
def containerd_snapshotter_suite(bed: Bed) -> None:
    """Every test of containerd's suite passes against our snapshotter over a proxy client."""
    if not _SUITE.exists():
        raise CaseFailed(f"{_SUITE} is missing: run `make suite`")

    program = bed.ovms.program("ovms-snapshotter")
    done = process.run(
        [_SUITE, "-test.v", "-test.parallel", "2"], status=None, timeout=bed.patience * 16,
        env={"OVMS_SNAPSHOTTER": str(program), "TMPDIR": str(bed.dir)},
    )

    failed = [line.strip() for line in done.text.splitlines() if line.strip().startswith("--- FAIL")]
    passed = [line for line in done.text.splitlines() if line.startswith("    --- PASS")]
    check(done.status == 0, f"{'; '.join(failed) or done.text[-600:]}")
    check(len(passed) >= 20, f"only {len(passed)} tests ran")
