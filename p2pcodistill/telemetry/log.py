"""The file that a site's events go into, and how it is read while it grows."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.records import Record, to_record


class EventLog:
    """Appends events to a JSONL file and hands each to subscribers, in order.

    Lines are flushed one by one, so that a reader (the live view of `simulate`, `tail -f`) is never far behind and a killed
    node loses at most the line being written.
    """

    def __init__(self, path: Path, *subscribers: Callable[[Record], None]) -> None:
        self._file: TextIO = path.open("a+", encoding="utf-8")
        self._subscribers = list(subscribers)
        if _ends_within_a_line(path):  # a killed writer tore its last line
            self._file.write("\n")

    def write(self, event: Event) -> None:
        """Append one event."""
        self.write_record(to_record(event))

    def write_record(self, record: Record) -> None:
        """Append a record that was stamped elsewhere (a rank's)."""
        self._file.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
        self._file.flush()
        for subscriber in list(self._subscribers):
            try:
                subscriber(record)
            except OSError:  # it prints into a pipe that nobody reads any more: the site goes on without it
                self._subscribers.remove(subscriber)

    def close(self) -> None:
        """Close the file; further writes raise ValueError. What a full disk did not take was reported by `write`."""
        with contextlib.suppress(OSError):
            self._file.close()


def _ends_within_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        return file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"


class EventTail:
    """Reads a growing JSONL file of events from where it left off. A torn last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset_bytes = 0

    def read(self) -> Iterator[Record]:
        """Yield the records that are complete since the last call; nothing while the file does not exist."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset_bytes += len(line)
                try:
                    record = json.loads(line)
                except ValueError:  # the line a killed writer tore, healed by the next writer's newline
                    continue
                if isinstance(record, dict):
                    yield record
