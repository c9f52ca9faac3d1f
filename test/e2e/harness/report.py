"""What a run says at its end, for people and in JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import records

DIRECTORY = Path(__file__).resolve().parents[3] / "target/e2e"


@dataclass(frozen=True)
class Outcome:
    """The result of one case in one place."""

    case: str
    where: str
    #: passed, failed or skipped.
    result: str
    seconds: float
    #: Why it failed or was skipped.
    reason: str = ""


def announce(outcome: Outcome) -> None:
    """Prints the line of one case."""
    reason = f": {outcome.reason}" if outcome.reason else ""
    print(f"{outcome.result:7} {outcome.where:22} {outcome.case} ({outcome.seconds:.1f} s){reason}", flush=True)


def close(outcomes: list[Outcome], path: Path, *, quiet: bool) -> int:
    """Writes the report, prints the closing lines and returns the exit status."""
    records.write(outcomes, path)
    count = {result: sum(o.result == result for o in outcomes) for result in ("passed", "failed", "skipped")}
    if not quiet:
        for outcome in outcomes:
            if outcome.result == "failed":
                print(f"FAILED {outcome.where} {outcome.case}: {outcome.reason}")
        reasons = sorted({o.reason for o in outcomes if o.result == "skipped"})
        for reason in reasons:
            print(f"SKIPPED {sum(o.reason == reason for o in outcomes)} because {reason}")
        print(f"report: {path}")
        print(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped", flush=True)
    return 1 if count["failed"] or not outcomes else 0
