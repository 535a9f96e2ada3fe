"""The transport inside one process: links with delay, bandwidth, loss and cuts, and a clock that can be virtual.

    network = MemoryNetwork()
    network.link("berlin", "tokyo", LinkConditions(delay_s=0.1, bandwidth_bytes_s=1e6))
    berlin, tokyo = MemoryTransport(network, "berlin"), MemoryTransport(network, "tokyo")

A link is a pair of reliable connections, as in reality: what is sent arrives in order, or the session ends. Hence a lost
bulk payload just does not arrive, while a lost control payload ends the session, which opens again at once. Each lane has
the link's bandwidth to itself in each direction; control is small beside bulk. With neither delay nor bandwidth, `send`
delivers before it returns, and no timer is used.

Every fault is counted in `MemoryNetwork.faults`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from p2pcodistill.errors import AddressError, RefusedError
from p2pcodistill.gossip.messages import Lane
from p2pcodistill.transport.base import (
    Closed,
    Opened,
    Received,
    Rejected,
    Traffic,
    TransportEvent,
    check_payload,
    check_sendable,
)
from p2pcodistill.transport.inbox import Inbox

MAX_INBOX_BYTES = 8 << 20
MAX_QUEUE_BYTES = 8 << 20
"""Of one lane in one direction: what is on its way, or has arrived at an inbox that is full."""


class Clock(Protocol):
    """What a network needs to know of time."""

    def now_s(self) -> float:
        """Seconds since some fixed moment; never goes back."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> object:
        """Call `callback` once, `delay_s` from now."""


class LoopClock:
    """The time of the running asyncio loop."""

    def now_s(self) -> float:
        """See `Clock.now_s`."""
        return asyncio.get_running_loop().time()

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> object:
        """See `Clock.call_later`."""
        return asyncio.get_running_loop().call_later(delay_s, callback)


@dataclass(frozen=True, slots=True)
class LinkConditions:
    """Of one link, in each direction. `bandwidth_bytes_s` None: unlimited. `loss_probability` is of each payload."""

    delay_s: float = 0.0
    bandwidth_bytes_s: float | None = None
    loss_probability: float = 0.0


@dataclass(slots=True)
class FaultCounts:
    """What has gone wrong so far: cuts, payloads lost at random, payloads on their way when their session ended."""

    num_cuts: int = 0
    num_payloads_lost: int = 0
    num_payloads_cut_off: int = 0


@dataclass(slots=True)
class _Queue:
    """One lane of a session in one direction. The first `num_due` payloads have arrived and wait for room."""

    receiver: MemoryTransport
    lane: Lane
    payloads: deque[tuple[bytes, ...]] = field(default_factory=deque)
    num_bytes: int = 0
    num_due: int = 0
    idle_from_s: float = 0.0
    last_due_s: float = 0.0


@dataclass(slots=True)
class _Link:
    """`queues` are the current session's, by sender and lane; there are none while there is no session."""

    ends: tuple[str, str]
    conditions: LinkConditions
    is_cut: bool = False
    queues: dict[tuple[str, Lane], _Queue] = field(default_factory=dict)


class MemoryNetwork:
    """The links that memory transports use. `seed` decides which payloads are lost."""

    def __init__(self, *, clock: Clock | None = None, seed: int = 0) -> None:
        self.faults = FaultCounts()
        self._clock = clock or LoopClock()
        self._random = random.Random(seed)
        self._links: dict[frozenset[str], _Link] = {}
        self._links_of: defaultdict[str, list[_Link]] = defaultdict(list)
        self._transports: dict[str, MemoryTransport] = {}

    def link(self, a: str, b: str, conditions: LinkConditions | None = None) -> None:
        """Join `a` and `b`, or change the conditions of their link for what is sent from now on."""
        conditions = conditions or LinkConditions()
        link = self._links.get(frozenset((a, b)))
        if link is None:
            link = self._links[frozenset((a, b))] = _Link((a, b), conditions)
            self._links_of[a].append(link)
            self._links_of[b].append(link)
        link.conditions = conditions
        self._begin(link)

    def cut(self, a: str, b: str) -> None:
        """End the session of `a` and `b`, with all that is on its way, and let none begin."""
        link = self._link_of(a, b)
        link.is_cut = True
        self.faults.num_cuts += 1
        self._end(link, f"the link between {a} and {b} was cut")

    def heal(self, a: str, b: str) -> None:
        """The opposite of `cut`."""
        link = self._link_of(a, b)
        link.is_cut = False
        self._begin(link)

    def inject(self, sender: str, receiver: str, lane: Lane, payload: Sequence[bytes]) -> bool:
        """Send as a hostile member could: what `send` would refuse to send, too. See `Transport.send`."""
        link = self._link_of(sender, receiver)
        queue = link.queues.get((sender, lane))
        if queue is None:
            return False
        num_bytes = sum(map(len, payload))
        if queue.num_bytes and queue.num_bytes + num_bytes > MAX_QUEUE_BYTES:
            if lane is Lane.CONTROL:
                self._restart(link, f"{receiver} does not take what it is sent")
            return False
        self._transports[sender].num_sent[receiver] += num_bytes
        loss_probability = link.conditions.loss_probability
        if loss_probability and self._random.random() < loss_probability:
            self.faults.num_payloads_lost += 1
            if lane is Lane.CONTROL:
                self._restart(link, f"the connection between {sender} and {receiver} broke")
            return True
        self._convey(queue, sender, tuple(payload), link.conditions)
        return True

    # --- for MemoryTransport ---------------------------------------------------------------------------------------

    def attach(self, transport: MemoryTransport) -> None:
        """`transport` is open. Raises AddressError when another one has its name."""
        name = transport.name
        if name in self._transports:
            raise AddressError(
                f"cannot listen as {name!r}: the name is in use; close the transport that has it"
            )
        self._transports[name] = transport
        for link in self._links_of[name]:
            self._begin(link)

    def detach(self, transport: MemoryTransport) -> None:
        """`transport` is closed; control payloads that it sent still arrive, before their session ends."""
        name = transport.name
        if self._transports.get(name) is not transport:
            return
        for link in self._links_of[name]:
            if link.queues:
                last_words = link.queues[name, Lane.CONTROL]
                last_words.num_due = len(last_words.payloads)
                self._deliver(name, last_words)
                self._end(link, f"{name} closed the connection")
        del self._transports[name]

    def has_link(self, a: str, b: str) -> bool:
        """Whether the two were ever linked."""
        return frozenset((a, b)) in self._links

    def peers_of(self, name: str) -> tuple[str, ...]:
        """Whom `name` has links with, in the order in which they were made."""
        return tuple(end for link in self._links_of[name] for end in link.ends if end != name)

    def num_bulk_bytes_under_way(self, sender: str, receiver: str) -> int:
        """Of the bulk that `sender` has sent in the current session: what the inbox of `receiver` has not taken."""
        queue = self._link_of(sender, receiver).queues.get((sender, Lane.BULK))
        return queue.num_bytes if queue else 0

    def deliver_waiting(self, receiver: str) -> None:
        """The inbox of `receiver` has room again."""
        for link in self._links_of[receiver]:
            for (sender, _), queue in link.queues.items():
                if sender != receiver:
                    self._deliver(sender, queue)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _link_of(self, a: str, b: str) -> _Link:
        return self._links[frozenset((a, b))]

    def _begin(self, link: _Link) -> None:
        ends = [self._transports.get(end) for end in link.ends]
        if link.queues or link.is_cut or None in ends:
            return
        for sender, receiver in (link.ends, link.ends[::-1]):
            for lane in Lane:
                link.queues[sender, lane] = _Queue(self._transports[receiver], lane)
        for end, peer in (link.ends, link.ends[::-1]):
            self._transports[end].inbox.put(Opened(peer))

    def _end(self, link: _Link, why: str) -> None:
        if not link.queues:
            return
        self.faults.num_payloads_cut_off += sum(len(queue.payloads) for queue in link.queues.values())
        for queue in link.queues.values():
            queue.payloads.clear()  # timers may still be running for them
        link.queues = {}
        for end, peer in (link.ends, link.ends[::-1]):
            self._transports[end].inbox.put(Closed(peer, why))

    def _restart(self, link: _Link, why: str) -> None:
        self._end(link, why)
        self._begin(link)

    def _convey(
        self, queue: _Queue, sender: str, payload: tuple[bytes, ...], conditions: LinkConditions
    ) -> None:
        num_bytes = sum(map(len, payload))
        now_s = self._clock.now_s()
        queue.payloads.append(payload)
        queue.num_bytes += num_bytes
        transmission_s = num_bytes / conditions.bandwidth_bytes_s if conditions.bandwidth_bytes_s else 0.0
        queue.idle_from_s = max(now_s, queue.idle_from_s) + transmission_s
        # Nothing overtakes what was sent under a longer delay.
        queue.last_due_s = max(queue.last_due_s, queue.idle_from_s + conditions.delay_s)
        if queue.last_due_s <= now_s:
            self._arrive(sender, queue)
        else:
            self._clock.call_later(queue.last_due_s - now_s, lambda: self._arrive(sender, queue))

    def _arrive(self, sender: str, queue: _Queue) -> None:
        # One call for each payload: the first that has not arrived yet is the one, whatever order equal timers run in.
        if queue.num_due < len(queue.payloads):
            queue.num_due += 1
            self._deliver(sender, queue)

    def _deliver(self, sender: str, queue: _Queue) -> None:
        receiver = queue.receiver
        while queue.num_due and not (queue.lane is Lane.BULK and receiver.inbox.full):
            payload = queue.payloads.popleft()
            sizes_bytes = [len(part) for part in payload]
            queue.num_due -= 1
            queue.num_bytes -= sum(sizes_bytes)
            receiver.num_received[sender] += sum(sizes_bytes)
            try:
                check_payload(queue.lane, sizes_bytes)
            except RefusedError as error:
                receiver.inbox.put(Rejected(sender, error.reason, f"{sender} sent {error}"))
            else:
                receiver.inbox.put(Received(sender, queue.lane, payload))


class MemoryTransport:
    """The `Transport` of the site `name`; its peers are those whom `network` links it with.

    The attributes are for the network, which moves payloads from one transport to the other.
    """

    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self.name = name
        self.inbox = Inbox(MAX_INBOX_BYTES)
        self.num_sent: Counter[str] = Counter()
        self.num_received: Counter[str] = Counter()
        self._network = network

    async def open(self) -> None:
        """See `Transport.open`. Raises AddressError while another transport of the network has this name."""
        self._network.attach(self)

    async def receive(self) -> TransportEvent:
        """See `Transport.receive`."""
        event = await self.inbox.get()
        if not self.inbox.full:
            self._network.deliver_waiting(self.name)
        return event

    def send(self, peer: str, lane: Lane, payload: Sequence[bytes]) -> bool:
        """See `Transport.send`."""
        if not self._network.has_link(self.name, peer):
            raise KeyError(peer)
        check_sendable(lane, payload)
        if self.inbox.has_news_of(peer):
            return False
        return self._network.inject(self.name, peer, lane, payload)

    def traffic(self) -> Mapping[str, Traffic]:
        """See `Transport.traffic`; payloads only, there are no envelopes."""
        return {
            peer: Traffic(
                self.num_sent[peer],
                self.num_received[peer],
                self._network.num_bulk_bytes_under_way(self.name, peer),
            )
            for peer in self._network.peers_of(self.name)
        }

    async def close(self) -> None:
        """See `Transport.close`."""
        self.inbox.fail(RuntimeError("the transport is closed"))
        self._network.detach(self)
