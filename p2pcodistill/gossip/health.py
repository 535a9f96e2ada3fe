"""Who is alive: what traffic and light pings tell of the peers that have a session.

A peer that is heard is alive. One that has been silent for a while is pinged; one that answers none of a few pings is
*suspect*: it keeps its session, which only the transport ends, but others are asked before it. Every so often, and when a
session begins, a ping is sent whatever the traffic, for its round trip.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from p2pcodistill.errors import MalformedError
from p2pcodistill.gossip.messages import Ping, Pong
from p2pcodistill.telemetry import node_events

NUM_PINGS_UNTIL_SUSPECT = 3
MEASURE_INTERVALS = 12
"""A round trip is measured at least every so many ping intervals."""


@dataclass(slots=True)
class _Peer:
    heard_s: float
    pinged_s: float = float("-inf")
    due_s: float = 0.0
    is_suspect: bool = False
    pings: dict[int, float] = field(default_factory=dict)  # under way, by nonce


class Health:
    """The peers of one site that are ready: when they were heard, and what is to be done about the silent ones."""

    def __init__(self, *, ping_interval_s: float) -> None:
        """`ping_interval_s`: the silence after which a peer is pinged; infinite: none ever is."""
        self._interval_s = ping_interval_s
        self._peers: dict[str, _Peer] = {}
        self._nonce = 0
        self._next_due_s = float("inf")

    @property
    def suspects(self) -> tuple[str, ...]:
        """The ready peers that may be gone."""
        return tuple(peer for peer, state in self._peers.items() if state.is_suspect)

    def open(self, peer: str, now_s: float) -> Ping | None:
        """`peer` became ready; what to send to it."""
        state = self._peers[peer] = _Peer(heard_s=now_s)
        return None if self._interval_s == float("inf") else self._ping(state, now_s)

    def close(self, peer: str) -> None:
        """The session with `peer` is over."""
        self._peers.pop(peer, None)

    def hear(self, peer: str, now_s: float) -> node_events.PeerRecovered | None:
        """A ready peer has sent something; what that means for a suspect."""
        state = self._peers[peer]
        silent_s, state.heard_s = now_s - state.heard_s, now_s
        if not state.is_suspect:
            return None
        state.is_suspect = False
        return node_events.PeerRecovered(peer, silent_s)

    def answer(self, peer: str, pong: Pong, now_s: float) -> float | None:
        """`peer` answered a ping: the round trip; None if the ping was given up. Raises MalformedError if there was none."""
        sent_s = self._peers[peer].pings.pop(pong.nonce, None)
        if sent_s is None and not 0 < pong.nonce <= self._nonce:
            raise MalformedError(f"{peer} answered a ping that was never sent")
        return None if sent_s is None else now_s - sent_s

    def tick(self, now_s: float) -> tuple[list[tuple[str, Ping]], list[node_events.PeerSuspected]]:
        """Time has passed: whom to ping, and who is suspect from now on."""
        pings: list[tuple[str, Ping]] = []
        suspected: list[node_events.PeerSuspected] = []
        if now_s < self._next_due_s:
            return pings, suspected
        self._next_due_s = float("inf")
        for peer, state in self._peers.items():
            if now_s >= state.due_s:
                silent_s = now_s - state.heard_s
                last_s = max(state.heard_s, state.pinged_s)
                if now_s - last_s >= self._interval_s or (
                    now_s - state.pinged_s >= MEASURE_INTERVALS * self._interval_s
                ):
                    pings.append((peer, self._ping(state, now_s)))
                if silent_s > NUM_PINGS_UNTIL_SUSPECT * self._interval_s and not state.is_suspect:
                    state.is_suspect = True
                    suspected.append(node_events.PeerSuspected(peer, silent_s))
                state.due_s = now_s + self._interval_s / 2
            self._next_due_s = min(self._next_due_s, state.due_s)
        return pings, suspected

    def _ping(self, state: _Peer, now_s: float) -> Ping:
        self._nonce += 1
        state.pings[self._nonce] = state.pinged_s = now_s
        while len(state.pings) > NUM_PINGS_UNTIL_SUSPECT:
            del state.pings[next(iter(state.pings))]
        state.due_s = now_s + self._interval_s / 2
        self._next_due_s = min(self._next_due_s, state.due_s)
        return Ping(self._nonce)
