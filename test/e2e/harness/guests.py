"""Guest images by what they do, so that one case runs with bare-metal guests and with a stock Debian alike."""

from __future__ import annotations


class Guests:
    """The images of one kind of guest, each built once a run."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def close(self) -> None:
        """Removes what was built."""
