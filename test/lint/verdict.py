"""The end of a check."""

import sys


def close(check: str, faults: list[str], good: str) -> int:
    """Prints the faults, or what is good; returns the exit status."""
    for fault in faults:
        print(f"{check}: {fault}", file=sys.stderr)
    if not faults:
        print(f"{check}: {good}")
    return 1 if faults else 0
