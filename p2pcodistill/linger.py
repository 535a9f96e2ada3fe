"""How long a site whose training is over stays: for its students' sake, and to say so to its teachers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from p2pcodistill.group.supervise import first_of

TELL_TIMEOUT_S = 30.0
"""A teacher that is not told serves its last checkpoint for the whole of its own `linger_s`; one that is gone never is."""


class Neighbours(Protocol):
    """What gossip knows of them."""

    @property
    def students_finished(self) -> bool:
        """Whether every student's training is over."""

    @property
    def teachers_told(self) -> bool:
        """Whether every teacher whose training goes on knows that this site's is over."""


async def linger(
    neighbours: Neighbours, moved: asyncio.Event, stop: asyncio.Event, *, linger_s: float
) -> None:
    """Return when every student has finished and every teacher was told, as far as that happens in time.

    The students have `linger_s`, the teachers what is left of that and TELL_TIMEOUT_S at most; `stop` ends it at once.
    `moved` is set when there may be something new.
    """
    deadline_s = time.monotonic() + linger_s
    await _wait_until(lambda: neighbours.students_finished, moved, stop, deadline_s)
    deadline_s = min(deadline_s, time.monotonic() + TELL_TIMEOUT_S)
    await _wait_until(lambda: neighbours.teachers_told, moved, stop, deadline_s)


async def _wait_until(
    condition: Callable[[], bool], moved: asyncio.Event, stop: asyncio.Event, deadline_s: float
) -> None:
    while not (condition() or stop.is_set()):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return
        await first_of(moved, stop, timeout_s=left_s)
        moved.clear()
