"""What a site had to say about each of its peers: what their link carried, and when they were not listened to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import (
    LinkMeasured,
    NodeStarted,
    PeerQuarantined,
    PeerSuspected,
    Refused,
)


@dataclass(slots=True)
class PeerHistory:
    """One peer, over all lives of the node. Rates and round trips are the best measured ones; None: never measured."""

    upload_mbit: float | None = None
    download_mbit: float | None = None
    round_trip_ms: float | None = None
    num_connection_losses: int = 0
    max_queued_bytes: int = 0
    """Of chunks that the peer had asked for and that had not reached it."""
    num_refusals: int = 0
    """Things from the peer that were refused."""
    num_quarantines: int = 0
    """How often it was not listened to for a while."""
    num_suspicions: int = 0
    """How often it did not answer although it was connected."""
    _num_earlier_losses: int = 0

    @property
    def is_measured(self) -> bool:
        """Whether anything is known of the link."""
        known = (self.upload_mbit, self.download_mbit, self.round_trip_ms)
        return any(value is not None for value in known) or self.num_connection_losses > 0

    def measure(self, link: LinkMeasured) -> None:
        """Take a measurement of the link into account."""
        self.upload_mbit = _best(max, self.upload_mbit, link.upload_mbit)
        self.download_mbit = _best(max, self.download_mbit, link.download_mbit)
        self.round_trip_ms = _best(min, self.round_trip_ms, link.round_trip_ms)
        self.num_connection_losses = self._num_earlier_losses + link.num_connection_losses
        self.max_queued_bytes = max(self.max_queued_bytes, link.queued_bytes)

    def begin_life(self) -> None:
        """The node starts, and counts from 0."""
        self._num_earlier_losses = self.num_connection_losses


def note_peers(peers: dict[str, PeerHistory], event: Event) -> None:
    """Take what `event` says of a peer into account; other events change nothing."""
    match event:
        case NodeStarted():
            for peer in peers.values():
                peer.begin_life()
        case LinkMeasured():
            _of(peers, event.peer).measure(event)
        case Refused(peer=str(name)):
            _of(peers, name).num_refusals += event.num_times
        case PeerQuarantined():
            _of(peers, event.peer).num_quarantines += 1
        case PeerSuspected():
            _of(peers, event.peer).num_suspicions += 1


def _of(peers: dict[str, PeerHistory], name: str) -> PeerHistory:
    return peers.setdefault(name, PeerHistory())


def _best(
    choose: Callable[[list[float]], float], known: float | None, measured: float | None
) -> float | None:
    values = [value for value in (known, measured) if value is not None]
    return choose(values) if values else None
