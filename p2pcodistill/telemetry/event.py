"""What all events have in common: what a site says about itself, as JSON lines that everything else is derived from.

A node appends every event to `events.jsonl` in its run folder; the live view, the summary and the report read events and
nothing else. Ranks hand their events to the node over the link, so one file tells the whole story of a site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. `name` is what the record's `event` key says."""

    name: ClassVar[str] = ""
