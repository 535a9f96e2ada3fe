"""Dialling: a channel to every peer whose address is known, one dial after the other.

A dial is two DEALERs, one for each lane, so that bulk has a TCP connection of its own. CURVE proves to us that we reached
the key that we expect; what becomes of the connections, libzmq tells by monitors.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from p2pcodistill.errors import UnknownPeerError, UnresolvedError
from p2pcodistill.gossip.messages import Lane
from p2pcodistill.identity import Identity, PublicIdentity
from p2pcodistill.transport.backoff import Backoff
from p2pcodistill.transport.base import split_address
from p2pcodistill.transport.channels import Channel
from p2pcodistill.transport.inbox import Inbox
from p2pcodistill.transport.lanes import Lanes
from p2pcodistill.transport.sockets import (
    Route,
    Timing,
    has_arrivals,
    make_socket,
    monitor_socket,
    receive_now,
    resolve_address,
)

LAST_WORDS_S = 0.05
"""How long the reading of what arrived before both connections broke may take; longer while there is something to read."""
_NEVER_MS = 3_600_000
"""A channel is its two connections and ends with them. (-1, or `immediate`, would throw away what has not been read yet.)"""


@dataclass(frozen=True, slots=True)
class PeerEndpoint:
    """A peer's keys, and where it listens: `address` is None for a peer that dials us."""

    public: PublicIdentity
    address: str | None = None


class _Dial:
    """One attempt to reach a peer at an address. `over` is set once its channel was dropped, `broken` for each lane whose
    connection is gone.

    `refusal` is for the user to look at: it was turned away, or its name does not resolve. `reason` is the word for that.
    """

    def __init__(self, channel: Channel, over: asyncio.Event, address: str) -> None:
        self.channel, self.over, self.address = channel, over, address
        self.dealers: dict[Lane, zmq.asyncio.Socket] = {}
        self.broken = {lane: asyncio.Event() for lane in Lane}
        self.refusal: str | None = None


class Dialler:
    """Dials the peers among `endpoints`, which may change, and that are not denied."""

    def __init__(
        self,
        identity: Identity,
        endpoints: Mapping[str, PeerEndpoint],
        lanes: Lanes,
        inbox: Inbox,
        timing: Timing,
        rng: random.Random,
    ) -> None:
        """`rng` draws how long to wait between dials."""
        self._identity, self._endpoints = identity, endpoints
        self._lanes, self._inbox = lanes, inbox
        self._timing, self._rng = timing, rng
        self._change = {name: asyncio.Event() for name in endpoints}

    def note_change(self, peer: str) -> None:
        """The address of `peer` has changed, or whether it is denied."""
        self._change[peer].set()

    async def keep_dialling(self, context: zmq.asyncio.Context, peer: str) -> None:
        """Keep a channel to `peer`, one dial after the other, while it has an address and is not denied."""
        backoff = Backoff(self._timing.min_redial_s, self._timing.max_redial_s, self._rng)
        last_refusal = told_refusal = None
        for attempt in itertools.count():
            while (address := self._endpoints[peer].address) is None or peer in self._lanes.denied:
                self._change[peer].clear()
                await self._change[peer].wait()
            target = await resolve_address(address, attempt)
            is_complete, reason = False, UnresolvedError.reason
            refusal: str | None = _unresolved(peer, address)
            if target is not None:
                reason = UnknownPeerError.reason
                is_complete, refusal = await self._dial(context, peer, address, target)
            # Told at the second time in a row: a peer that is just going down does not refuse us.
            if refusal is None:
                told_refusal = None
            elif refusal == last_refusal != told_refusal:
                self._lanes.refuse(peer, reason, refusal)
                told_refusal = refusal
            last_refusal = refusal
            if is_complete:
                backoff.reset()
            await asyncio.sleep(backoff.next_s())

    async def _dial(
        self, context: zmq.asyncio.Context, peer: str, address: str, target: str
    ) -> tuple[bool, str | None]:
        """Dial both lanes and serve them until the channel is dropped. Whether it was complete, and why it was refused."""
        if peer in self._lanes.denied:  # since the name was looked up
            return False, None
        with ExitStack() as resources:
            dial = _Dial(*self._lanes.dial(peer), address)
            async with asyncio.TaskGroup() as tasks:
                try:
                    workers = [tasks.create_task(self._outlive(dial))]
                    for lane in Lane:
                        dealer = make_socket(
                            resources, context, zmq.DEALER, self._identity, self._timing, target
                        )
                        if lane is Lane.BULK:
                            dealer.linger = 0
                        dealer.curve_serverkey = z85.encode(self._endpoints[peer].public.curve_key)
                        dealer.reconnect_ivl = _NEVER_MS
                        dial.dealers[lane] = dealer
                        monitor = monitor_socket(resources, dealer, zmq.EVENT_ALL)
                        workers.append(tasks.create_task(self._watch(dial, lane, monitor)))
                        workers.append(tasks.create_task(self._read(dial.channel, lane, dealer)))
                        dealer.connect(target)
                    await dial.over.wait()
                finally:  # also when the transport closes or fails: nobody may use these sockets any more
                    self._lanes.lose(dial.channel, "this site is closing")
                for worker in workers:
                    worker.cancel()
        return dial.channel.complete, dial.refusal

    async def _watch(self, dial: _Dial, lane: Lane, monitor: zmq.asyncio.Socket) -> None:
        channel, peer = dial.channel, dial.channel.peer
        while True:
            match parse_monitor_message(await monitor.recv_multipart())["event"]:
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    channel.routes[lane] = Route(dial.dealers[lane])
                    self._lanes.greet(channel, lane)
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    dial.refusal = (
                        f"{peer} at {dial.address} does not know our key: add this site's public identity to "
                        "its list"
                    )
                    self._lanes.lose(channel, dial.refusal)
                case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                    dial.refusal = (
                        f"{dial.address} answers, but not as {peer}: check the address, and that the public identity "
                        f"listed here for {peer} is the one that it uses"
                    )
                    self._lanes.lose(channel, dial.refusal)
                case zmq.EVENT_CLOSED:
                    self._lanes.lose(channel, f"nobody answers at {dial.address}")
                case zmq.EVENT_DISCONNECTED:
                    channel.broken = channel.broken or f"the connection with {peer} broke"
                    dial.broken[lane].set()

    async def _outlive(self, dial: _Dial) -> None:
        """Once both connections are gone nothing more can come: drop the channel when all that has come is read."""
        for broken in dial.broken.values():
            await broken.wait()
        is_read = False
        while not is_read:
            await asyncio.sleep(LAST_WORDS_S)
            is_read = not any(has_arrivals(dealer) for dealer in dial.dealers.values())
        assert dial.channel.broken is not None, "as told with the first of them"
        self._lanes.lose(dial.channel, dial.channel.broken)

    async def _read(self, channel: Channel, lane: Lane, dealer: zmq.asyncio.Socket) -> None:
        while True:
            await self._inbox.room()
            self._lanes.hear(channel, lane, await dealer.recv_multipart(copy=False))
            for frames in receive_now(dealer):
                self._lanes.hear(channel, lane, frames)
                if self._inbox.full:
                    break
            await asyncio.sleep(0)  # what is ready does not yield, and others want their turn


def _unresolved(peer: str, address: str) -> str:
    host, _ = split_address(address)
    return f"the host name {host!r} of {peer} does not resolve: check the address of {peer} and this machine's name server"
