"""Figures, for people and in JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "target/bench/report.json"


@dataclass(frozen=True)
class Figure:
    """One measured value beside what it is compared with."""

    name: str
    #: Median unless the name says otherwise, in `unit`; none: it was not measured, and `against` says why.
    value: float | None
    unit: str
    #: What it is compared with and that one's value; empty for a figure that stands alone.
    against: str = ""
    #: value ÷ the other's median.
    ratio: float | None = None
    #: What is to be reached, as a sentence.
    goal: str = ""
    holds: bool | None = None


def compared(name: str, value: float, unit: str, other: str, floor: float, most: float) -> Figure:
    """A figure whose ratio to a floor or peer of the same run may be `most` at the most."""
    ratio = value / floor
    return Figure(name, round(value, 3), unit, f"{other} {floor:.3f} {unit}", round(ratio, 3), f"ratio <= {most}", ratio <= most)


def bounded(name: str, value: float, unit: str, most: float) -> Figure:
    """A figure with a bound of its own."""
    return Figure(name, round(value, 3), unit, "", None, f"<= {most} {unit}", value <= most)


def skipped(name: str, reason: str) -> Figure:
    """A figure that could not be had here."""
    return Figure(name, None, "", reason)


def announce(figure: Figure) -> None:
    """Prints the line of one figure."""
    if figure.value is None:
        print(f"{figure.name}: not measured: {figure.against}", flush=True)
        return
    against = f", {figure.against}, ratio {figure.ratio}" if figure.against else ""
    verdict = "" if figure.holds is None else f" [{figure.goal}: {'holds' if figure.holds else 'MISSED'}]"
    print(f"{figure.name}: {figure.value} {figure.unit}{against}{verdict}", flush=True)
