"""Runs the cases one after another, each on a bed of its own."""

from __future__ import annotations

import fnmatch
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from testbed import gotools, guest, nestedhost

from . import emulator, places, process, records, report
from .bed import Bed
from .case import CASES, CONTAINERDS, Case, CaseFailed, CaseSkipped
from .containerd import programs
from .guests import Guests
from .report import Outcome

#: Seconds that something quick may take: on this machine, and in an emulated one.
PATIENCE = {"native": 15.0, "direct": 15.0, "nested": 90.0}
#: How much longer a whole case may take in an emulated host.
SLOWNESS = {"native": 1.0, "direct": 1.0, "nested": 5.0}
#: How often a nested case may be tried, each time on a fresh host, if the emulator broke it (module `emulator`).
#: A case that passed only then says so in the report.
NESTED_ATTEMPTS = 3
#: Where cases keep their files: /tmp of the nested host is memory, which its guests need.
SCRATCH = {"native": "/tmp", "direct": "/tmp", "nested": "/var/tmp"}


class _TimedOut(Exception):
    """The case used up its time."""


def containerds() -> tuple[str, ...]:
    """The releases of containerd to run on: those of `CONTAINERD`, newest first, or what every run covers."""
    asked = os.environ.get("CONTAINERD", "").split()
    return tuple(f"containerd-{version}" for version in asked) or CONTAINERDS


def names() -> list[str]:
    """The names of all cases, in the order in which they run."""
    return [case.name for case in CASES]


def run_everywhere(where: str, pattern: str, inside: bool, path: Path) -> list[Outcome]:
    """Runs the matching cases in every place that `where` stands for; the report on disk grows with them."""
    process.become_subreaper()
    wanted = [case for case in CASES if any(fnmatch.fnmatch(case.name, glob) for glob in pattern.split())]
    if not inside and wanted:
        _make_what_is_missing(where)
    outcomes: list[Outcome] = []
    for place in places.chosen(where):
        # The nested host is told what to run; the rest is known here.
        if not inside:
            outcomes += [outcome for case in wanted for outcome in plan(case, place, containerds())[1]]
            records.write(outcomes, path)
        elsewhere = place == "nested" and not inside
        for outcome in _run_nested(wanted) if elsewhere else _run_here(wanted, place):
            outcomes.append(outcome)
            # What runs elsewhere announces itself.
            if not elsewhere:
                report.announce(outcome)
            records.write(outcomes, path)
    return outcomes


def _make_what_is_missing(where: str) -> None:
    """Fills the cache before the first case's clock runs, and outside the nested host, which only reads it."""
    usable = [place for place in places.chosen(where) if not places.unusable(place)]
    for release in containerds() if usable else ():
        programs(release)
    if usable:
        gotools.directory(gotools.ORAS)
        gotools.directory(gotools.NERDCTL)
    if any(place != "native" for place in usable):
        guest.guest()


def _run_nested(wanted: list[Case]) -> Iterator[Outcome]:
    reason = places.unusable("nested")
    relevant = [case for case in wanted if plan(case, "nested", containerds())[0]]
    if reason:
        for case in relevant:
            outcome = Outcome(case.name, "nested", "skipped", 0, reason)
            report.announce(outcome)
            yield outcome
        return
    if not relevant:
        return
    before: dict[str, str] = {}
    for attempt in range(1, NESTED_ATTEMPTS + 1):
        again: dict[str, str] = {}
        for outcome in _attempt_nested(relevant):
            if outcome.result == "failed" and outcome.reason.startswith(emulator.MARK) and attempt < NESTED_ATTEMPTS:
                again[outcome.case] = outcome.reason
            elif outcome.case in before:
                yield replace(outcome, reason=f"attempt {attempt}, before: {before[outcome.case]}; {outcome.reason}".rstrip("; "))
            else:
                yield outcome
        if not again:
            return
        before |= again
        relevant = [case for case in relevant if case.name in again]
        print(f"nested: the emulator broke {len(relevant)} cases, trying these on a fresh host", flush=True)


def _attempt_nested(relevant: list[Case]) -> list[Outcome]:
    """One run of these cases in the nested host; whatever it does not come to has failed."""
    host = nestedhost.NestedHost.default()
    # The nested host shares the checkout, and nothing else of this one's files, with this one.
    inner = report.DIRECTORY / "report-nested.json"
    inner.unlink(missing_ok=True)
    # No case is silent for longer than its time limit.
    silence = 2 * max(case.seconds for case in relevant) * SLOWNESS["nested"]
    try:
        argv = ["python3", "-B", str(Path(__file__).resolve().parents[1] / "run.py"), "--inside", "--where", "nested",
                "--case", " ".join(case.name for case in relevant), "--report", str(inner)]
        with host.use():
            ended = f"the run in the nested host ended with {nestedhost.relay(host, argv, cwd='/', silence=silence)} before this case"
    except nestedhost.NestedError as error:
        ended = f"{emulator.MARK}{error}"
        # It hangs, or is dead already.
        host.stop()
    if complaint := emulator.host_complaint(host.console):
        host.stop()
    outcomes = [_with_complaint(outcome, complaint) for outcome in records.read(Outcome, inner)]
    for name in sorted({case.name for case in relevant} - {outcome.case for outcome in outcomes}):
        outcome = _with_complaint(Outcome(name, "nested", "failed", 0, ended), complaint)
        report.announce(outcome)
        outcomes.append(outcome)
    return outcomes


def _with_complaint(outcome: Outcome, complaint: str) -> Outcome:
    """A case that failed on a host whose kernel says that it is broken proves nothing."""
    if outcome.result != "failed" or not complaint:
        return outcome
    return replace(outcome, reason=f"{emulator.MARK}the host's kernel says {complaint!r}; {outcome.reason}")


def plan(case: Case, place: str, chosen: tuple[str, ...]) -> tuple[list[str], list[Outcome]]:
    """Of the releases of containerd that were chosen those on which a case runs in a place, "" if it needs none, and an outcome for
    each on which it does not, with the reason."""
    kind = "native" if place == "native" else "stock"
    if kind not in case.guests:
        needs = {"stock": "its guests are bare-metal ones, which native runs", "native": "it needs an unmodified Debian: direct or nested"}
        return [], [Outcome(case.name, place, "skipped", 0, needs[kind])]
    if not case.containerds:
        return [""], []
    meant = case.releases(chosen)
    # An emulated host is slow.
    runs = list(meant[:1] if place == "nested" else meant)
    skipped = []
    for release in chosen:
        if release not in runs:
            reason = "one release of containerd is enough there" if release in meant else f"it is about {' and '.join(case.containerds)}"
            skipped.append(Outcome(case.name, _where(place, release), "skipped", 0, reason))
    return runs, skipped


def _where(place: str, release: str) -> str:
    return f"{place}/{release}" if release else place


def _run_here(wanted: list[Case], place: str) -> Iterator[Outcome]:
    kind = "native" if place == "native" else "stock"
    reason = places.unusable(place)
    no_kvm = places.without_kvm()
    guests = Guests(kind, SCRATCH[place])
    try:
        for case in wanted:
            for release in plan(case, place, containerds())[0]:
                where = _where(place, release)
                if reason or (case.vm and no_kvm):
                    yield Outcome(case.name, where, "skipped", 0, reason or no_kvm)
                else:
                    yield _run_case(case, place, where, release, guests)
    finally:
        guests.close()


def _run_case(case: Case, place: str, where: str, release: str, guests: Guests) -> Outcome:
    began = time.monotonic()
    with _uninterrupted():
        bed = Bed(release, guests, PATIENCE[place], SCRATCH[place])
    result, reasons = "passed", []
    try:
        with _time_limit(case.seconds * SLOWNESS[place]):
            case.body(bed)
    except CaseSkipped as skip:
        result, reasons = "skipped", [str(skip)]
    except CaseFailed as failure:
        result, reasons = "failed", [str(failure)]
    except _TimedOut:
        result, reasons = "failed", [f"not done after {case.seconds * SLOWNESS[place]:.0f} s, at {_place_in(sys.exc_info()[2])}"]
    except KeyboardInterrupt:
        with _uninterrupted():
            bed.close()
        raise
    # A case that breaks must not take the cases after it along.
    except Exception as error:
        result, reasons = "failed", [f"{type(error).__name__} at {_place_in(error.__traceback__)}: {error}"]
    seconds = time.monotonic() - began
    with _uninterrupted():
        logs = report.DIRECTORY / "logs" / f"{where.replace('/', '-')}-{case.name}"
        shutil.rmtree(logs, ignore_errors=True)
        wrong = bed.close(failed=result == "failed", logs=logs)
    if wrong:
        result, reasons = "failed", [*reasons, *wrong]
    if result == "failed" and place == "nested" and emulator.guest_died_at_boot(reasons, logs):
        reasons = [f"{emulator.MARK}the guest met a triple fault before its init", *reasons]
    return Outcome(case.name, where, result, round(seconds, 2), "; ".join(reasons))


def _place_in(trace: object) -> str:
    frames = [frame for frame in traceback.extract_tb(trace) if "/cases/" in frame.filename]  # type: ignore[arg-type]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the harness"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Puts off an interrupt to the end of the block, however often it is sent."""
    seen = False

    def remember(_number: int, _frame: FrameType | None) -> None:
        nonlocal seen
        seen = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def expire(_number: int, _frame: FrameType | None) -> None:
        raise _TimedOut

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
