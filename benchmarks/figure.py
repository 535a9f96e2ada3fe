"""What every benchmark prints: one JSON object a line."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def print_figure(
    figure: str,
    value: float | None,
    unit: str,
    bound: str,
    *,
    holds: bool | None,
    on: str,
    why: str = "",
    **details: Any,
) -> None:
    """Print one figure. `holds` is None when it was not run, and then `why` says why not.

    `on` says what it was measured on; the machine is added.
    """
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {version('torch')}"
    line = {"figure": figure, "value": value, "unit": unit, "bound": bound, "holds": holds}
    line |= {"why": why} if why else {}
    print(json.dumps(line | {"measured_on": f"{on}; {machine}"} | details), flush=True)


def file_system_of(folder: Path) -> str:
    """The type of the file system that a folder is on, as in `ext4`."""
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "an unknown file system"
