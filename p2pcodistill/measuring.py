"""What a node tells of its traffic: to the event log, and to rank 0 what its frames may count on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from p2pcodistill.links import LinkMeter
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.node_events import TrafficMeasured
from p2pcodistill.transport.base import Traffic

LINK_INTERVAL_S = 5.0
MIN_TRAFFIC_BYTES = 4096


class Measurements:
    """Writes what has moved and what links carry, as often as there is something to tell."""

    def __init__(
        self, traffic: Callable[[], Mapping[str, Traffic]], links: LinkMeter, events: EventLog
    ) -> None:
        self._traffic, self._links, self._events = traffic, links, events
        self._num_bytes_reported = 0
        self._links_reported_s = 0.0

    def tick(self) -> float | None:
        """Write what is due; returns the bytes a second that rank 0's frames may count on, where it is time to tell it."""
        self._write_traffic()
        if time.monotonic() - self._links_reported_s < LINK_INTERVAL_S:
            return None
        self._links_reported_s = time.monotonic()
        self._write_links()
        return self._links.shared_rate_bytes_s()

    def flush(self) -> None:
        """Write all that there is to tell, in the end."""
        self._write_traffic()
        self._write_links()

    def _write_links(self) -> None:
        for measured in self._links.measure():
            self._events.write(measured)

    def _write_traffic(self) -> None:
        """Write what has moved since the last time, if it is more than signs of life."""
        traffic = self._traffic()
        num_sent = sum(t.num_bytes_sent for t in traffic.values())
        num_received = sum(t.num_bytes_received for t in traffic.values())
        if num_sent + num_received < self._num_bytes_reported + MIN_TRAFFIC_BYTES:
            return
        self._num_bytes_reported = num_sent + num_received
        self._events.write(
            TrafficMeasured(
                num_bytes_sent=num_sent,
                num_bytes_received=num_received,
                num_bytes_sent_by_peer={peer: t.num_bytes_sent for peer, t in traffic.items()},
                num_bytes_received_by_peer={peer: t.num_bytes_received for peer, t in traffic.items()},
            )
        )
