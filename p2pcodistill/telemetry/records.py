"""Events as records, and back.

An event's record is one flat JSON object: `event` (its name), `time_unix_s` (the wall clock of the machine that wrote it;
informative only, nothing is ordered by it) and the fields of its class.
"""

from __future__ import annotations

import math
import time
from dataclasses import MISSING, asdict, fields
from typing import Any, TypeAlias

from p2pcodistill.telemetry import node_events, simulation_events, training_events
from p2pcodistill.telemetry.event import Event

EVENT_TYPES: dict[str, type[Event]] = {
    event_type.name: event_type
    for module in (node_events, training_events, simulation_events)
    for event_type in vars(module).values()
    if isinstance(event_type, type) and issubclass(event_type, Event) and event_type is not Event
}
"""Every event of this version, by its name."""

Record: TypeAlias = dict[str, Any]


def _finite(value: Any) -> Any:
    # JSON has no NaN; a diverged loss must still be readable by strict parsers.
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_record(event: Event, *, time_unix_s: float | None = None) -> Record:
    """The flat record of `event`, stamped with `time_unix_s` (now by default)."""
    stamp = time.time() if time_unix_s is None else time_unix_s
    return {"event": event.name, "time_unix_s": stamp} | {k: _finite(v) for k, v in asdict(event).items()}


def from_record(record: Record) -> Event:
    """The event of a record; `time_unix_s` is left to the caller.

    Raises ValueError when the record names no event of this version or lacks a field.
    """
    cls = EVENT_TYPES.get(str(record.get("event")))
    if cls is None:
        raise ValueError(f"unknown event {record.get('event')!r}")
    try:
        return cls(
            **{
                f.name: record[f.name]
                for f in fields(cls)
                if f.name in record or (f.default is MISSING and f.default_factory is MISSING)
            }
        )
    except KeyError as error:
        raise ValueError(f"event {cls.name!r} lacks the field {error}") from error
