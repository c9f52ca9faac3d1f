"""The list of cases: a case is a function with a name, a place to run and a containerd to run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bed import Bed

#: The containerd releases that the cases run on, newest first.
CONTAINERDS = ("containerd-2.4", "containerd-1.7")


def major(release: str) -> int:
    """1 or 2, of a release as in `CONTAINERDS`."""
    return int(release.partition("-")[2].partition(".")[0])


class CaseFailed(Exception):
    """What the case looked for is not so; the message says what was seen instead."""


class CaseSkipped(Exception):
    """The case cannot be run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One case."""

    name: str
    body: Callable[[Bed], None]
    #: Needs /dev/kvm.
    vm: bool
    #: Where it makes sense: "native" (bare-metal guests), "stock" (an unmodified Debian), or both.
    guests: tuple[str, ...]
    #: Releases of containerd it runs on; empty: it needs none.
    containerds: tuple[str, ...]
    #: Seconds it may take on a machine with hardware virtualisation.
    seconds: float

    def releases(self, chosen: tuple[str, ...]) -> tuple[str, ...]:
        """What it runs on if `chosen` was asked for: the releases as new as those that it is meant for."""
        majors = {major(release) for release in self.containerds}
        if chosen == CONTAINERDS:
            return self.containerds
        return tuple(release for release in chosen if major(release) in majors)


CASES: list[Case] = []


def case(
    *,
    vm: bool = True,
    guests: tuple[str, ...] = ("native", "stock"),
    containerds: tuple[str, ...] = CONTAINERDS,
    seconds: float = 60,
) -> Callable[[Callable[[Bed], None]], Callable[[Bed], None]]:
    """Enters the function in the list under `<module>.<function>`."""

    def enter(body: Callable[[Bed], None]) -> Callable[[Bed], None]:
        name = f"{body.__module__.rpartition('.')[2]}.{body.__name__}"
        CASES.append(Case(name, body, vm, guests, containerds, seconds))
        return body

    return enter


def check(holds: object, otherwise: str) -> None:
    """Fails the case with `otherwise` unless `holds`."""
    if not holds:
        raise CaseFailed(otherwise)


def contains(text: str, wanted: str, where: str) -> None:
    """Fails the case unless `wanted` is in `text`, showing the end of what was there."""
    if wanted not in text:
        raise CaseFailed(f"no {wanted!r} in {where}, which ends with: {tail(text)!r}")


def tail(text: str, length: int = 600) -> str:
    """The end of a text, for messages."""
    return text if len(text) <= length else "…" + text[-length:]
