"""Peer-to-peer codistillation: sites train copies of one model on their own data and learn from stale copies of each other's
weights.

    codistiller = p2pcodistill.join(model)
    loss = criterion(logits, targets) + codistiller.loss(logits, inputs)
    codistiller.step()

Importing the package costs nothing: names are handed over when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pcodistill.codistill.codistiller import Codistiller as Codistiller
    from p2pcodistill.config import CodistillationConfig as CodistillationConfig
    from p2pcodistill.group.exchange import join as join

    __version__: str

_HOMES = {
    "CodistillationConfig": "p2pcodistill.config",
    "Codistiller": "p2pcodistill.codistill.codistiller",
    "join": "p2pcodistill.group.exchange",
}

__all__ = ["CodistillationConfig", "Codistiller", "__version__", "join"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("p2pcodistill")
    except PackageNotFoundError:
        return "0.0.0+unknown"  # run from a source tree that was not installed
