"""What adds up over the lives of a node, each of which begins with `NodeStarted`: its bytes, and the seconds that it ran."""

from __future__ import annotations

from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import NodeStarted, TrafficMeasured


class TrafficTotals:
    """Bytes sent and received over all lives of a node, from counters that start at 0 in each."""

    def __init__(self) -> None:
        self._earlier = (0, 0)
        self._current = (0, 0)

    def update(self, event: Event) -> None:
        """Take a start of the node or a measurement into account; other events change nothing."""
        if isinstance(event, NodeStarted):
            self._begin_life()
        elif isinstance(event, TrafficMeasured):
            measured = (event.num_bytes_sent, event.num_bytes_received)
            if measured[0] < self._current[0] or measured[1] < self._current[1]:
                self._begin_life()  # the record of the start was torn when the machine went down
            self._current = measured

    def _begin_life(self) -> None:
        self._earlier = (self.num_bytes_sent, self.num_bytes_received)
        self._current = (0, 0)

    @property
    def num_bytes_sent(self) -> int:
        """Bytes handed to the transport so far."""
        return self._earlier[0] + self._current[0]

    @property
    def num_bytes_received(self) -> int:
        """Bytes received from the transport so far."""
        return self._earlier[1] + self._current[1]


class Elapsed:
    """Seconds since the first record, without the pauses between lives: nothing runs in a simulation that was stopped.

    With `counts_pauses`, they count: where faults took the site away while others went on.
    """

    def __init__(self, *, counts_pauses: bool = False) -> None:
        self._counts_pauses = counts_pauses
        self._last_s: float | None = None
        self._seconds = 0.0

    def update(self, event: Event, time_unix_s: float) -> float:
        """The seconds until `event`, which was recorded then; events come in the order of their records."""
        is_pause = isinstance(event, NodeStarted) and not self._counts_pauses
        if self._last_s is not None and not is_pause:
            self._seconds += time_unix_s - self._last_s
        self._last_s = time_unix_s
        return self._seconds
