"""The cases, by topic. A module here is found by its name alone."""

from __future__ import annotations

import importlib
import pkgutil


def load() -> None:
    """Imports every module, which enters its cases in the list."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
