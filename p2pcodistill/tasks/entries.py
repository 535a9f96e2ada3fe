"""Entries of `data` and `held_out` compared: paths, or data sets of the hub.

What is trained on and what is evaluated on must not meet, under whatever names they are listed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from p2pcodistill.task_configs import is_hub_source
from p2pcodistill.tasks.hub import HubSource

_Identity: TypeAlias = Path | HubSource


def distinct_entries(entries: Iterable[Path]) -> list[Path]:
    """`entries` in their order, each once, whatever it is called. Raises DataError for one of the hub that has no name."""
    found: dict[_Identity, Path] = {}
    for entry in entries:
        found.setdefault(_identity_of(entry), entry)
    return list(found.values())


def have_overlap(one: Path, other: Path) -> bool:
    """Whether two entries have examples in common, by their names. Raises DataError like `distinct_entries`."""
    mine, theirs = _identity_of(one), _identity_of(other)
    if isinstance(mine, HubSource) and isinstance(theirs, HubSource):
        # Where the subset is left out there is only one.
        have_one_subset = mine.subset is None or theirs.subset is None or mine.subset == theirs.subset
        return mine.name == theirs.name and have_one_subset and _splits_overlap(mine.split, theirs.split)
    if isinstance(mine, Path) and isinstance(theirs, Path):
        return mine == theirs or mine in theirs.parents or theirs in mine.parents
    return False


def _identity_of(entry: Path) -> _Identity:
    return HubSource.parse(entry) if is_hub_source(entry) else entry.resolve()


def _splits_overlap(one: str, other: str) -> bool:
    """Of splits such as `train`, `train[:10%]` and `train+test`; two slices of a split are taken to be disjoint."""
    for mine in one.split("+"):
        for theirs in other.split("+"):
            if mine == theirs or theirs == mine.partition("[")[0] or mine == theirs.partition("[")[0]:
                return True
    return False
