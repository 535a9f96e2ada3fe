"""Wall clocks that are wrong: how the processes of a site get one, and how its event log is read all the same.

Nothing but event logs depends on wall clocks; so only they have to be put right, for a report that shows several sites.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from p2pcodistill.telemetry.records import Record
from p2pcodistill.telemetry.simulation_events import FaultInjected

_OFFSET_FILE = "offset_s"
_SLACK_S = 1.0
_CUSTOMIZE = f'''"""Written by p2pcodistill simulate: the wall clock is wrong by what the file beside this one says."""

import pathlib
import time

_file = pathlib.Path(__file__).with_name("{_OFFSET_FILE}")
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + float(_file.read_text())
time.time_ns = lambda: _time_ns() + round(float(_file.read_text()) * 1e9)
'''


class WrongClock:
    """What `time.time` and `time.time_ns` say in Python processes that are started in `environment`: right until `set`."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made, for this clock alone."""
        self._folder = folder
        folder.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(_CUSTOMIZE)
        self.set(0.0)

    @property
    def environment(self) -> Mapping[str, str]:
        """What is to be added to that of a process."""
        known = os.environ.get("PYTHONPATH")
        folder = str(self._folder.absolute())
        return {"PYTHONPATH": os.pathsep.join([folder, known] if known else [folder])}

    def set(self, offset_s: float) -> None:
        """Be ahead by so much from now on, in processes that run already, too."""
        staged = self._folder / f"{_OFFSET_FILE}.new"
        staged.write_text(repr(offset_s))
        staged.replace(self._folder / _OFFSET_FILE)


def put_right(records: Iterable[Record], told: Iterable[Record]) -> list[Record]:
    """The `records` of a site's log with the times that a right clock would have given them.

    `told` is what the simulator, whose clock is right, told of the site. That a clock was set shows in the log as a jump:
    the offsets have to be much larger than a second.
    """
    changes = [
        (float(record["time_unix_s"]), float(record["offset_s"] or 0.0))
        for record in told
        if record["event"] == FaultInjected.name and record["kind"] == "clock"
    ]
    if not changes:
        return list(records)
    offset_s, last_s, righted = 0.0, 0.0, []
    for record in records:
        time_s = float(record.get("time_unix_s") or 0.0)
        while changes:
            changed_s, next_offset_s = changes[0]
            if last_s - _SLACK_S <= time_s - offset_s <= changed_s + _SLACK_S:
                break  # it fits as it is
            if time_s - next_offset_s < changed_s - _SLACK_S:
                break  # it would fit no better
            offset_s = next_offset_s
            del changes[0]
        last_s = time_s - offset_s
        righted.append(record | {"time_unix_s": last_s})
    return righted
