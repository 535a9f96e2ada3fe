"""Event logs of many sites, as nodes would write them: the same records in the same files, stamped with virtual time."""

from __future__ import annotations

import json
import time
from pathlib import Path

from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.records import to_record

_MAX_WAITING = 2000
_MAX_WAITING_S = 1.0
"""Of real time, for those who follow the logs while they grow."""


class VirtualLogs:
    """Appends events to files, few of which are ever open: a run may have more sites than a process may have files."""

    def __init__(self) -> None:
        self._waiting: dict[Path, list[str]] = {}
        self._num_waiting = 0
        self._flushed_s = time.monotonic()

    def write(self, path: Path, time_s: float, event: Event) -> None:
        """Append one event; it is in the file after `flush`, with a later event, or some thousand events later."""
        line = json.dumps(to_record(event, time_unix_s=time_s), separators=(",", ":"), allow_nan=False)
        self._waiting.setdefault(path, []).append(line)
        self._num_waiting += 1
        if self._num_waiting >= _MAX_WAITING or time.monotonic() - self._flushed_s > _MAX_WAITING_S:
            self.flush()

    def flush(self) -> None:
        """Write what waits. Raises OSError."""
        waiting, self._waiting, self._num_waiting = self._waiting, {}, 0
        self._flushed_s = time.monotonic()
        for path, lines in waiting.items():
            with path.open("a", encoding="utf-8") as file:
                file.write("\n".join([*lines, ""]))
