"""What a simulation's run folder was made with, and in which format: `run.json`, written before anything starts."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Note what the run in the new `folder` is made with, and how it is begun."""
    setup = {"num_cores": num_cores, "in_namespaces": in_namespaces}
    _write(folder, {"format": RUN_FORMAT, "made_with": versions(num_cores), "setup": setup})


def note_start(folder: Path, num_cores: int) -> None:
    """Note what the run goes on with, where that is something else than before. Raises RunFolderError as `read_setup`."""
    made_with = _all_made_with(folder)
    if (now := versions(num_cores)) != made_with[-1]:
        record = json.loads((folder / RUN_RECORD_FILE).read_text())
        _write(folder, record | {"went_on_with": [*made_with[1:], now]})


def describe_changes(folder: Path) -> list[str]:
    """A line of what the run went on with that it was not begun with; none where it was always the same."""
    made_with = _all_made_with(folder)
    changes = []
    for name in made_with[0]:
        used = list(dict.fromkeys(versions.get(name, "unknown") for versions in made_with))
        if len(used) > 1:
            changes.append(f"{name} {', then '.join(used)}")
    return [f"went on with something else than it began with: {'; '.join(changes)}"] if changes else []


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
    """Software and its version at the begin; empty of a folder where nothing was noted.

    Raises RunFolderError for a run of another format.
    """
    return _all_made_with(folder)[0]


def _all_made_with(folder: Path) -> list[Mapping[str, str]]:
    """What the run was begun with, then whatever else it went on with."""
    path = folder / RUN_RECORD_FILE
    if not path.exists():
        return [{}]
    try:
        record = json.loads(path.read_text())
        run_format = record["format"]
        noted = [record["made_with"], *record.get("went_on_with", ())]
        made_with: list[Mapping[str, str]] = [
            {str(name): str(version) for name, version in entry.items()} for entry in noted
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunFolderError(f"{path} is damaged: remove it to go without what it says") from None
    if run_format != RUN_FORMAT:
        raise RunFolderError(
            f"{folder} is a run of format {run_format}, and this p2pcodistill reads format {RUN_FORMAT}: "
            f"use the version that made it, {made_with[0].get('p2pcodistill', 'whichever it was')}"
        )
    return made_with


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_durably(folder / RUN_RECORD_FILE, (json.dumps(record, indent=2) + "\n").encode())


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
