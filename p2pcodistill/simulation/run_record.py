"""What a simulation's run folder was made with, and in which format: `run.json`, written before anything starts."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from p2pcodistill.checkpoint.durable import write_durably
from p2pcodistill.errors import RunFolderError

RUN_FORMAT = 1
"""Of the run folder: to be raised when a reader of today's would misunderstand what is written then."""
RUN_RECORD_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class Setup:
    """How a simulation was begun, where the scenario does not say it: it goes on in the same way."""

    num_cores: int
    in_namespaces: bool


def write_run_record(folder: Path, num_cores: int, *, in_namespaces: bool = False) -> None:
    """Note what the run in `folder` is made with; what is noted already stays."""
    path = folder / RUN_RECORD_FILE
    if not path.exists():
        setup = {"num_cores": num_cores, "in_namespaces": in_namespaces}
        record = {"format": RUN_FORMAT, "made_with": versions(num_cores), "setup": setup}
        write_durably(path, (json.dumps(record, indent=2) + "\n").encode())


def read_setup(folder: Path) -> Setup:
    """How the run in `folder` was begun. Raises RunFolderError where that was not noted, or in another format."""
    read_run_record(folder)
    try:
        setup = json.loads((folder / RUN_RECORD_FILE).read_text())["setup"]
        return Setup(int(setup["num_cores"]), bool(setup["in_namespaces"]))
    except (OSError, KeyError, ValueError, TypeError):
        raise RunFolderError(
            f"{folder} is no run that can go on: there is no {RUN_RECORD_FILE} that says how it was begun"
        ) from None


def read_run_record(folder: Path) -> Mapping[str, str]:
    """Software and its version; empty of a folder where nothing was noted.

    Raises RunFolderError for a run of another format.
    """
    path = folder / RUN_RECORD_FILE
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        run_format = record["format"]
        made_with = {str(name): str(version) for name, version in record["made_with"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunFolderError(f"{path} is damaged: remove it to go without what it says") from None
    if run_format != RUN_FORMAT:
        raise RunFolderError(
            f"{folder} is a run of format {run_format}, and this p2pcodistill reads format {RUN_FORMAT}: "
            f"use the version that made it, {made_with.get('p2pcodistill', 'whichever it was')}"
        )
    return made_with


def versions(num_cores: int) -> dict[str, str]:
    """What a run that starts now is made with. Does not import torch."""
    return {
        "p2pcodistill": _version("p2pcodistill"),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "pyzmq": _version("pyzmq"),
        "platform": platform.platform(),
        "cores": str(num_cores),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # run from the source folder
        return "not installed"
