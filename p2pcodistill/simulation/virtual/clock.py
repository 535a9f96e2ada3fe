"""Virtual time: callbacks in the order of their time, and of two at one time, in the order in which they were asked for."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any, TypeAlias

_Entry: TypeAlias = tuple[float, int, Callable[..., None], tuple[Any, ...]]


class VirtualClock:
    """A discrete-event clock. Nothing takes time but waiting; `now_s` is the time of the callback that runs.

    There is no way to take a callback back: whoever loses interest in one looks, when it comes, whether it still matters.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_events = 0
        """Callbacks that have run."""
        self._entries: list[_Entry] = []
        self._num_asked = 0

    def call_at(self, time_s: float, callback: Callable[..., None], *arguments: Any) -> None:
        """Run `callback` at `time_s`, which must not lie in the past."""
        assert time_s >= self.now_s, "time does not go back"
        self._num_asked += 1
        heapq.heappush(self._entries, (time_s, self._num_asked, callback, arguments))

    def call_later(self, delay_s: float, callback: Callable[..., None], *arguments: Any) -> None:
        """Run `callback` after `delay_s`, at least 0."""
        self.call_at(self.now_s + delay_s, callback, *arguments)

    def run(self, until_s: float, *, is_over: Callable[[], bool] | None = None) -> None:
        """Run what is due up to and including `until_s`, or until `is_over` says so after a callback.

        Unless it was over before, the time is `until_s` then, if that is finite.
        """
        entries = self._entries
        while entries and entries[0][0] <= until_s:
            self.now_s, _, callback, arguments = heapq.heappop(entries)
            self.num_events += 1
            callback(*arguments)
            if is_over is not None and is_over():
                return
        if math.isfinite(until_s):
            self.now_s = max(self.now_s, until_s)
