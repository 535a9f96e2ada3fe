"""Events whose steps are counted otherwise than the loop that reports them counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from p2pcodistill.telemetry.event import Event

_STEPS = ("step", "start_step", "num_steps")


def count_steps(event: Event, change: Callable[[int], int]) -> Event:
    """`event` with each of its steps changed."""
    fields: dict[str, Any] = {
        name: change(value) for name in _STEPS if (value := getattr(event, name, None)) is not None
    }
    return dataclasses.replace(event, **fields)
