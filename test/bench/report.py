"""Figures, for people and in JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "target/bench/report.json"


@dataclass(frozen=True)
class Figure:
    """One measured value beside what it is compared with."""

    name: str
    #: Median, in `unit`.
    value: float
    unit: str
    #: What it is compared with and that one's median; empty for a figure that stands alone.
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


def announce(figure: Figure) -> None:
    """Prints the line of one figure."""
    against = f", {figure.against}, ratio {figure.ratio}" if figure.against else ""
    verdict = "" if figure.holds is None else f" [{figure.goal}: {'holds' if figure.holds else 'MISSED'}]"
    print(f"{figure.name}: {figure.value} {figure.unit}{against}{verdict}", flush=True)


def write(figures: list[Figure], path: Path) -> None:
    """Writes the report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n", encoding="utf-8")
    scratch.rename(path)


def read(path: Path) -> list[Figure]:
    """Reads a report written by `write`."""
    return [Figure(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
