"""Links in virtual time: what `shaping` does to TCP connections, done to payloads, without a byte being copied.

A link joins two sites and is made of two wires, one for each direction. Both lanes share a wire's bandwidth, control first:
a control payload goes ahead of the bulk that waits, and holds up the bulk that is being sent for as long as it takes itself.
What has left a wire travels for the latency; each lane keeps its order. A lost packet costs its bandwidth again and a round
trip, as TCP would have it. Bandwidth counts payload; headers are left out.

A link has a session as long as both sites are up and nothing separates them. When a session ends, what was on its way is
lost, and the next one begins after a handshake and a random delay. Every fault is counted.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from p2pcodistill.errors import ReplayedError
from p2pcodistill.gossip.messages import Lane, Payload
from p2pcodistill.simulation.shaping import PACKET_BYTES, LinkShape
from p2pcodistill.simulation.virtual.clock import VirtualClock
from p2pcodistill.telemetry.simulation_events import LinkCarried

SILENCE_TIMEOUT_S = 10.0
"""After so long without a sign of life the transport gives a connection up."""
RECONNECT_DELAY_S = 1.0
"""A new session begins after a handshake and at most this."""
REDIAL_INTERVAL_S = 10.0
"""How often a machine tries again whose place was taken by another one with its key."""
_HANDSHAKE_ROUND_TRIPS = 3.0
"""TCP's, and two of CURVE's."""
_MIN_RESEND_S = 0.02


class Endpoint(Protocol):
    """A site, as a link sees it."""

    def opened(self, peer: str) -> None:
        """A session with `peer` begins."""

    def closed(self, peer: str, why: str) -> None:
        """The session with `peer` is over."""

    def received(self, peer: str, payload: Payload) -> None:
        """`peer` sent this within the present session."""

    def rejected(self, peer: str, reason: str, why: str) -> None:
        """Somebody with the key of `peer` was refused a session."""


@dataclass(slots=True)
class LinkFaults:
    """What has gone wrong on a link so far."""

    num_cuts: int = 0
    num_packets_lost: int = 0
    num_payloads_cut_off: int = 0
    """On their way when their session ended."""
    num_payloads_swallowed: int = 0
    """Sent into a black hole."""
    num_claims_refused: int = 0
    """Sessions that a machine wanted whose place another one has taken."""


class Wire:
    """One direction of a link."""

    __slots__ = (
        "_arriving_s",
        "_bulk",
        "_bulk_free_s",
        "_bytes_per_s",
        "_clock",
        "_control_free_s",
        "_faults",
        "_is_steady",
        "_jitter_s",
        "_latency_s",
        "_loss_ratio",
        "_num_under_way",
        "_resend_s",
        "_rng",
        "_session",
        "deliver",
        "max_bytes_queued",
        "num_bytes_arrived",
        "num_bytes_queued",
        "num_bytes_sent",
        "num_payloads_sent",
    )

    def __init__(
        self,
        clock: VirtualClock,
        shape: LinkShape,
        faults: LinkFaults,
        rng: Callable[[], random.Random],
    ) -> None:
        self._clock, self._faults, self._rng = clock, faults, rng
        self.deliver: Callable[[Payload], None] | None = None
        """Who is told what arrives; nothing is sent before it is set."""
        self._bytes_per_s = shape.bytes_per_s
        self._latency_s = shape.latency_ms / 1e3
        self._jitter_s = shape.jitter_ms / 1e3
        self._loss_ratio = shape.loss_ratio
        self._is_steady = not (shape.jitter_ms or shape.loss_ratio)
        self._resend_s = max(shape.round_trip_s, _MIN_RESEND_S)
        self._session = 0
        self._num_under_way = 0
        self._control_free_s = self._bulk_free_s = 0.0
        self._arriving_s = [0.0, 0.0]  # of each lane, what was sent last
        self._bulk: deque[tuple[Payload, int]] = deque()  # the first is being sent
        self.num_bytes_sent = 0
        """Of payloads that were handed over, whether or not they arrived."""
        self.num_bytes_arrived = 0
        self.num_payloads_sent = 0
        self.num_bytes_queued = 0
        """Of bulk that is being sent or waits for it."""
        self.max_bytes_queued = 0

    @property
    def rate_bytes_s(self) -> float | None:
        """What it carries, as bulk shows that has waited for it; None: none has."""
        return self._bytes_per_s if self.max_bytes_queued else None

    def send(self, lane: Lane, payload: Payload, num_bytes: int) -> None:
        """Send `payload`, which takes as long as `num_bytes` do."""
        self.num_bytes_sent += num_bytes
        self.num_payloads_sent += 1
        if self._bytes_per_s is None:
            delay_s = self._lose(num_bytes)[1] if self._loss_ratio else 0.0
            self._depart(lane, payload, num_bytes, delay_s)
        elif lane is Lane.CONTROL:
            now_s = self._clock.now_s
            num_resent_bytes, delay_s = self._lose(num_bytes) if self._loss_ratio else (0, 0.0)
            duration_s = (num_bytes + num_resent_bytes) / self._bytes_per_s
            self._control_free_s = max(now_s, self._control_free_s) + duration_s
            if self._bulk:
                self._bulk_free_s += duration_s
            self._depart(lane, payload, num_bytes, self._control_free_s - now_s + delay_s)
        else:
            self._bulk.append((payload, num_bytes))
            self.num_bytes_queued += num_bytes
            if self.num_bytes_queued > self.max_bytes_queued:
                self.max_bytes_queued = self.num_bytes_queued
            if len(self._bulk) == 1:
                self._begin_bulk()

    def clear(self) -> None:
        """The session is over: nothing of it arrives any more."""
        self._session += 1
        self._faults.num_payloads_cut_off += self._num_under_way + len(self._bulk)
        self._num_under_way = self.num_bytes_queued = 0
        self._bulk.clear()
        self._control_free_s = self._bulk_free_s = 0.0
        self._arriving_s = [0.0, 0.0]

    def _begin_bulk(self) -> None:
        assert self._bytes_per_s is not None
        num_bytes = self._bulk[0][1]
        num_resent_bytes, delay_s = self._lose(num_bytes) if self._loss_ratio else (0, 0.0)
        begin_s = max(self._clock.now_s, self._control_free_s)
        self._bulk_free_s = begin_s + (num_bytes + num_resent_bytes) / self._bytes_per_s
        self._clock.call_at(self._bulk_free_s, self._end_bulk, self._session, delay_s)

    def _end_bulk(self, session: int, delay_s: float) -> None:
        if session != self._session:
            return
        if self._clock.now_s < self._bulk_free_s:  # control went ahead
            self._clock.call_at(self._bulk_free_s, self._end_bulk, session, delay_s)
            return
        payload, num_bytes = self._bulk.popleft()
        self.num_bytes_queued -= num_bytes
        self._depart(Lane.BULK, payload, num_bytes, delay_s)
        if self._bulk:
            self._begin_bulk()

    def _depart(self, lane: Lane, payload: Payload, num_bytes: int, delay_s: float) -> None:
        """Have `payload` arrive, `delay_s` and the latency from now."""
        arrives_s = self._clock.now_s + delay_s + self._latency_s
        if not self._is_steady:
            arrives_s += self._rng().random() * self._jitter_s
            arrives_s = self._arriving_s[lane] = max(self._arriving_s[lane], arrives_s)
        self._num_under_way += 1
        self._clock.call_at(arrives_s, self._arrive, self._session, payload, num_bytes)

    def _arrive(self, session: int, payload: Payload, num_bytes: int) -> None:
        if session == self._session:
            self._num_under_way -= 1
            self.num_bytes_arrived += num_bytes
            assert self.deliver is not None
            self.deliver(payload)

    def _lose(self, num_bytes: int) -> tuple[int, float]:
        """(bytes that have to be sent again, seconds until the last of them is noticed to be lost)."""
        num_packets, num_lost, num_rounds = -(-num_bytes // PACKET_BYTES), 0, 0
        while num_packets:
            num_packets = count_lost(num_packets, self._loss_ratio, self._rng())
            num_lost += num_packets
            num_rounds += num_packets > 0
        self._faults.num_packets_lost += num_lost
        return num_lost * PACKET_BYTES, num_rounds * self._resend_s


def count_lost(num_packets: int, loss_ratio: float, rng: random.Random) -> int:
    """How many of `num_packets` are lost, each by itself; takes time for each that is lost, not for each packet."""
    num_lost, index = 0, -1
    log_kept = math.log1p(-loss_ratio)
    while True:
        index += 1 + int(math.log(1.0 - rng.random()) / log_kept)
        if index >= num_packets:
            return num_lost
        num_lost += 1


class VirtualLink:
    """The link between two sites, whose names are `ends`; `shapes` are those of ends[0] -> ends[1] and of the way back.

    It has a session once both sites are `attach`ed, and is separated by `block` and `darken`.
    """

    def __init__(
        self,
        clock: VirtualClock,
        ends: tuple[str, str],
        shapes: tuple[LinkShape, LinkShape],
        *,
        seed: str,
    ) -> None:
        self.ends = ends
        self.faults = LinkFaults()
        self.is_open = False
        self._clock = clock
        self._seed = f"{seed}/{ends[0]}/{ends[1]}"
        self._own_rng: random.Random | None = None
        self._shapes = shapes
        self._sites: dict[str, Endpoint] = {}
        self._num_blocks = 0
        self._is_dark = False
        self._session = 0
        self._is_connecting = False
        self._wires = {
            end: Wire(clock, shape, self.faults, self._rng) for end, shape in zip(ends, shapes, strict=True)
        }
        interval_s = shapes[0].reset_interval_s
        if interval_s is not None:
            clock.call_later(interval_s, self._reset, interval_s)

    def peer_of(self, site: str) -> str:
        """The other end."""
        return self.ends[1] if site == self.ends[0] else self.ends[0]

    def wire_from(self, site: str) -> Wire:
        """What `site` sends on."""
        return self._wires[site]

    def send(self, site: str, lane: Lane, payload: Payload, num_bytes: int) -> None:
        """Send from the end `site`; what is sent without a session is lost."""
        if not self.is_open:
            return
        if self._is_dark:
            self.faults.num_payloads_swallowed += 1
            return
        self._wires[site].send(lane, payload, num_bytes)

    # --- what may happen to it ---------------------------------------------------------------------------------------

    def attach(self, site: str, endpoint: Endpoint) -> None:
        """The site is up. If it was already, this is another machine with its key, and newer: it takes the place of the
        first, which is refused from then on."""
        if site in self._sites:
            self._close(f"the process of {site} was replaced")
            self._clock.call_later(REDIAL_INTERVAL_S, self._refuse, site)
        self._sites[site] = endpoint
        peer = self.peer_of(site)
        self._wires[peer].deliver = partial(endpoint.received, peer)
        self._connect(0.0)

    def detach(self, site: str, why: str) -> None:
        """The site is down: the other end sees the connection end. Does nothing if it was."""
        if self._sites.pop(site, None) is not None:
            self._close(why)

    def measure(self) -> LinkCarried:
        """What it was given to carry so far, and what became of it."""
        num_bytes = sum(wire.num_bytes_sent for wire in self._wires.values())
        return LinkCarried(
            list(self.ends), num_bytes, self.faults.num_cuts, self.faults.num_payloads_swallowed
        )

    def cut(self, why: str = "the connection was reset") -> None:
        """End the session, if there is one; another begins."""
        if self.is_open:
            self.faults.num_cuts += 1
            self._close(why)
            self._connect(self._rng().random() * RECONNECT_DELAY_S)

    def block(self) -> None:
        """End the session, and let none begin until `unblock` was called as often."""
        self._num_blocks += 1
        self._close("the connection was reset")

    def unblock(self) -> None:
        """Take one `block` back."""
        self._num_blocks -= 1
        self._connect(self._rng().random() * RECONNECT_DELAY_S)

    def darken(self, is_dark: bool) -> None:
        """Let all that is sent vanish, while nobody sees the connection end but by its silence; or stop doing so."""
        self._is_dark = is_dark
        if is_dark:
            for wire in self._wires.values():
                wire.clear()
            self._clock.call_later(SILENCE_TIMEOUT_S, self._notice_silence, self._session)
        else:
            self._close("the connection broke")  # what is missing in it cannot be made up for
            self._connect(self._rng().random() * RECONNECT_DELAY_S)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _rng(self) -> random.Random:
        if self._own_rng is None:  # most links of a large run never need one
            self._own_rng = random.Random(self._seed)
        return self._own_rng

    def _connect(self, delay_s: float) -> None:
        if not self._can_connect() or self._is_connecting:
            return
        self._is_connecting = True
        round_trip_s = (self._shapes[0].latency_ms + self._shapes[1].latency_ms) / 1e3
        self._clock.call_later(delay_s + _HANDSHAKE_ROUND_TRIPS * round_trip_s, self._open)

    def _can_connect(self) -> bool:
        return self._can_pass() and not self.is_open and len(self._sites) == len(self.ends)

    def _open(self) -> None:
        self._is_connecting = False
        if not self._can_connect():
            return
        self.is_open = True
        self._session += 1
        for site in self.ends:
            if self.is_open:  # the first may have ended it
                self._sites[site].opened(self.peer_of(site))

    def _close(self, why: str) -> None:
        if not self.is_open:
            return
        self.is_open = False
        for wire in self._wires.values():
            wire.clear()
        for site in self.ends:
            if site in self._sites:
                self._sites[site].closed(self.peer_of(site), why)

    def _refuse(self, site: str) -> None:
        """The machine whose place was taken dials again: what the transport says then."""
        peer = self.peer_of(site)
        if peer in self._sites and self._can_pass():
            self.faults.num_claims_refused += 1
            why = f"{site} was replaced by a newer process: do two processes hold its key?"
            self._sites[peer].rejected(site, ReplayedError.reason, why)
        self._clock.call_later(REDIAL_INTERVAL_S, self._refuse, site)

    def _can_pass(self) -> bool:
        return not (self._num_blocks or self._is_dark)

    def _notice_silence(self, session: int) -> None:
        if self._is_dark and session == self._session:
            self._close(f"was silent for {SILENCE_TIMEOUT_S:g} s")

    def _reset(self, interval_s: float) -> None:
        self.cut()
        self._clock.call_later(interval_s, self._reset, interval_s)
