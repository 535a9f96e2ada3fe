"""What the links of a virtual site carry: as events tell it, and as it decides how large chunks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from p2pcodistill.checkpoint.manifest import DEFAULT_CHUNK_BYTES, MIN_CHUNK_BYTES
from p2pcodistill.links import LinkMeter
from p2pcodistill.simulation.virtual.links import VirtualLink
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import FrameFetched, FrameRelayed, TrafficMeasured, VersionAnnounced
from p2pcodistill.transport.base import Traffic
from p2pcodistill.transport.shaper import UploadCaps


def scaled(event: Event, bytes_scale: int) -> Event:
    """What gossip reports, with the sizes that its frames stand for: each byte for so many."""
    if bytes_scale == 1:
        return event
    match event:  # `replace` would take several times as long
        case VersionAnnounced(origin, incarnation, step, num_bytes):
            return VersionAnnounced(origin, incarnation, step, num_bytes * bytes_scale)
        case FrameFetched(
            origin, incarnation, step, kind, num_bytes, num_resent_bytes, duration_s
        ) | FrameRelayed(origin, incarnation, step, kind, num_bytes, num_resent_bytes, duration_s):
            sizes_bytes = num_bytes * bytes_scale, num_resent_bytes * bytes_scale
            return type(event)(origin, incarnation, step, kind, *sizes_bytes, duration_s)
    return event


class SiteTraffic:
    """The traffic of one site. `links`, by peer, may still grow; `chunk_bytes` is the size in memory of a chunk that travels
    over a fast link as one of DEFAULT_CHUNK_BYTES."""

    def __init__(
        self,
        site: str,
        links: Mapping[str, VirtualLink],
        students: Sequence[str],
        caps: UploadCaps,
        *,
        chunk_bytes: int,
    ) -> None:
        self._site, self._links, self._students = site, links, students
        self._scale = DEFAULT_CHUNK_BYTES / chunk_bytes
        self._meter = LinkMeter(
            students, caps, traffic=self._with_students, downloads=dict, num_waiting_bytes=lambda _peer: 0
        )
        self._shown: dict[str, Traffic] = {}
        self._before: dict[str, tuple[int, int]] = {}
        self.measured_s = 0.0
        """When traffic was measured last, or began to count."""

    def begin(self, now_s: float) -> None:
        """Count from now on: the node has been started."""
        self._before = {peer: self._moved(peer) for peer in self._links}
        self.measured_s = now_s

    def measure(self, now_s: float) -> TrafficMeasured:
        """What the links have carried since the node was started."""
        self.measured_s = now_s
        sent, received = {}, {}
        for peer, (sent_before, received_before) in self._before.items():
            num_sent, num_received = self._moved(peer)
            sent[peer], received[peer] = num_sent - sent_before, num_received - received_before
        return TrafficMeasured(sum(sent.values()), sum(received.values()), sent, received)

    def chunk_bytes(self, num_bytes: int) -> int:
        """The size of the chunks of a frame of `num_bytes`: as at a real site, for frames of the size that it stands for."""
        return max(MIN_CHUNK_BYTES, int(self._meter.chunk_bytes(int(num_bytes * self._scale)) / self._scale))

    def _with_students(self) -> dict[str, Traffic]:
        """How much the ways to the students carry, where bulk has shown it; that stays as it is."""
        for student in self._students:
            if student not in self._shown:
                rate_bytes_s = self._links[student].wire_from(self._site).rate_bytes_s
                if rate_bytes_s is not None:
                    self._shown[student] = Traffic(0, 0, rate_bytes_s=rate_bytes_s)
        return self._shown

    def _moved(self, peer: str) -> tuple[int, int]:
        """Bytes that the site has sent to `peer` and received from it, in all its lives."""
        link = self._links[peer]
        return link.wire_from(self._site).num_bytes_sent, link.wire_from(peer).num_bytes_arrived
