"""A hostile site in virtual time: an `Endpoint` of its links, in the place of the site that it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from p2pcodistill.gossip.messages import Payload
from p2pcodistill.simulation.hostile import TICK_S, HostileSite, Spoken
from p2pcodistill.simulation.virtual.clock import VirtualClock
from p2pcodistill.simulation.virtual.links import VirtualLink


class HostileEndpoint:
    """Has `hostile` speak over the `links` of its site, by peer, from `start` to `end`."""

    def __init__(
        self, name: str, hostile: HostileSite, links: Mapping[str, VirtualLink], clock: VirtualClock
    ) -> None:
        self._name, self._hostile, self._links, self._clock = name, hostile, links, clock
        self._is_up = False

    @property
    def num_misdeeds(self) -> int:
        """See `HostileSite`."""
        return self._hostile.num_misdeeds

    def start(self) -> None:
        """Take the place of the site, which must be down."""
        self._is_up = True
        for link in self._links.values():
            link.attach(self._name, self)
        self._clock.call_later(TICK_S, self._tick)

    def end(self) -> None:
        """Fall silent for good."""
        if self._is_up:
            self._is_up = False
            for link in self._links.values():
                link.detach(self._name, "the connection was reset")

    def opened(self, peer: str) -> None:
        """See `links.Endpoint`."""
        self._send(self._hostile.opened(peer))

    def closed(self, peer: str, why: str) -> None:
        """See `links.Endpoint`."""
        self._hostile.closed(peer)

    def received(self, peer: str, payload: Payload) -> None:
        """See `links.Endpoint`."""
        self._send(self._hostile.received(peer, payload))

    def rejected(self, peer: str, reason: str, why: str) -> None:
        """See `links.Endpoint`. It does not care."""

    def _tick(self) -> None:
        if self._is_up:
            self._send(self._hostile.tick())
            self._clock.call_later(TICK_S, self._tick)

    def _send(self, spoken: Iterable[Spoken]) -> None:
        for peer, lane, payload in spoken:
            self._links[peer].send(self._name, lane, payload, sum(map(len, payload)))
