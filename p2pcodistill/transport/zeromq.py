"""The transport between sites: ZeroMQ over TCP, encrypted and authenticated by CURVE on both sides.

A transport listens on one ROUTER. For each peer whose address is known it dials two DEALERs, one for each lane, so that
bulk has a TCP connection of its own. CURVE proves to the dialler that it reached the key it expects; an allow-list, asked
by libzmq for every connection (ZAP), admits only members' keys. Whoever sends is the key that the list admitted (`User-Id`
in the metadata of each frame), whatever routing id or greeting comes with it.

`transport.channels` decides which channel carries the session, `transport.wire` holds what is said beneath the payloads;
this module does it. libzmq refuses frames over the cap before it allocates them, but collects all frames of a message
before it hands them over: a *member* could fill memory with an endless one. Strangers do not get that far.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from p2pcodistill.errors import (
    AddressError,
    MalformedError,
    RefusedError,
    RevokedError,
    UnknownPeerError,
    UnresolvedError,
)
from p2pcodistill.gossip.messages import Lane
from p2pcodistill.gossip.window import LinkEstimate
from p2pcodistill.identity import Identity, PublicIdentity
from p2pcodistill.transport import wire
from p2pcodistill.transport.backoff import Backoff
from p2pcodistill.transport.base import (
    Received,
    Rejected,
    Traffic,
    TransportEvent,
    check_address,
    check_payload,
    check_sendable,
    split_address,
)
from p2pcodistill.transport.channels import Channel, Drop, PeerChannels, Pick, Step
from p2pcodistill.transport.inbox import Inbox
from p2pcodistill.transport.receipts import RECEIPT_INTERVAL_S, Deliveries
from p2pcodistill.transport.refusals import RefusalLog
from p2pcodistill.transport.sockets import (
    Route,
    Timing,
    answer_zap,
    bind_socket,
    make_socket,
    monitor_socket,
    open_zap,
    resolve_address,
    send_now,
)

MAX_INBOX_BYTES = 8 << 20
FRAME_ENVELOPE_BYTES = 42
"""What CURVE and ZMTP add to each part of a message (7 less for one below 256 bytes)."""
_MAX_FORMER_ROUTES = 64
_MIN_VIEW_BYTES = 32 << 10
_NEVER_MS = 3_600_000
"""A channel is its two connections and ends with them. (-1, or `immediate`, would throw away what has not been read yet.)"""


@dataclass(frozen=True, slots=True)
class PeerEndpoint:
    """A peer's keys, and where it listens: `address` is None for a peer that dials us."""

    public: PublicIdentity
    address: str | None = None


class _Dial:
    """One attempt to reach a peer. `over` is set once its channel was dropped.

    `refusal` is for the user to look at: it was turned away, or its name does not resolve. `reason` is the word for that.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.over = asyncio.Event()
        self.refusal: str | None = None
        self.reason = UnknownPeerError.reason


class ZeroMQTransport:
    """The `Transport` that connects this site with `peers` (name -> endpoint), listening on `listen`.

    The constructor raises AddressError when an address cannot be one. `listen_address` is the address that is listened
    on, with the real port once open.
    """

    def __init__(
        self,
        identity: Identity,
        listen: str,
        peers: Mapping[str, PeerEndpoint],
        *,
        timing: Timing | None = None,
        rng: random.Random | None = None,
        denied: Collection[str] = (),
    ) -> None:
        """`rng` draws how long to wait between dials. `denied` are the peers to `deny` from the start."""
        self.listen_address = check_address(listen, listen=True)
        for name, peer in peers.items():
            if peer.address is not None:
                try:
                    check_address(peer.address, listen=False)
                except AddressError as error:
                    raise AddressError(f"the address of {name}: {error}") from None
        self._identity = identity
        self._endpoints = dict(peers)
        self._denied = set(denied)
        self._dials_change = {name: asyncio.Event() for name in peers}
        self._timing = timing or Timing()
        self._names = {z85.encode(peer.public.curve_key): name for name, peer in peers.items()}
        own_key = identity.public.curve_key
        self._peers = {
            name: PeerChannels(name, leads=own_key < peer.public.curve_key) for name, peer in peers.items()
        }
        self._rng = rng or random.Random()
        self._links = {name: LinkEstimate() for name in peers}
        self._session = os.urandom(wire.ID_BYTES)
        self._accepted: dict[bytes, tuple[Channel, Lane]] = {}
        self._former_routes: deque[bytes] = deque(maxlen=_MAX_FORMER_ROUTES)
        self._dials: dict[Channel, _Dial] = {}
        self._inbox = Inbox(MAX_INBOX_BYTES)
        self._refusals = RefusalLog(self._inbox.put, self._timing.refusal_interval_s)
        self._num_sent: Counter[str] = Counter()
        self._num_received: Counter[str] = Counter()
        self._resources = ExitStack()
        self._runner: asyncio.Task[None] | None = None

    # --- the Protocol ----------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Listen and begin to dial. Raises AddressError when the address cannot be listened on."""
        with ExitStack() as resources:
            context = zmq.asyncio.Context()
            resources.callback(context.term)
            zap = open_zap(resources, context)  # before the address: without ZAP libzmq admits everybody
            router = make_socket(
                resources, context, zmq.ROUTER, self._identity, self._timing, self.listen_address
            )
            router.curve_server = True
            router.zap_domain = b"p2pcodistill"
            router.router_mandatory = True
            monitor = monitor_socket(resources, router, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
            self.listen_address = bind_socket(router, self.listen_address)
            self._runner = asyncio.create_task(
                self._run(context, zap, router, monitor), name="zeromq-transport"
            )
            self._resources = resources.pop_all()

    async def receive(self) -> TransportEvent:
        """See `Transport.receive`."""
        return await self._inbox.get()

    def send(self, peer: str, lane: Lane, payload: Sequence[bytes]) -> bool:
        """See `Transport.send`."""
        channel = self._peers[peer].in_use
        check_sendable(lane, payload)
        if channel is None or self._inbox.has_news_of(peer):
            return False
        num_bytes = sum(map(len, payload))
        if lane is Lane.BULK and not channel.deliveries.has_room(num_bytes):
            return False
        sent = self._put(channel, lane, [wire.DATA, *payload])
        if sent and lane is Lane.BULK:
            channel.deliveries.send(num_bytes, self._now_s())
        if not sent and lane is Lane.CONTROL:
            channel.broken = channel.broken or f"{peer} does not take what it is sent"
        return sent

    def traffic(self) -> Mapping[str, Traffic]:
        """See `Transport.traffic`."""
        return {peer: self._traffic_of(channels) for peer, channels in self._peers.items()}

    def _traffic_of(self, channels: PeerChannels) -> Traffic:
        peer, channel, link = channels.peer, channels.in_use, self._links[channels.peer]
        num_under_way = channel.deliveries.num_under_way_bytes if channel else 0
        return Traffic(
            self._num_sent[peer],
            self._num_received[peer],
            num_under_way,
            link.rate_bytes_s,
            link.round_trip_s,
        )

    async def close(self) -> None:
        """See `Transport.close`. Holds the loop for at most `Timing.flush_s`, if a peer does not take its last messages."""
        self._inbox.fail(RuntimeError("the transport is closed"))
        for channels in self._peers.values():
            for channel in list(channels.channels):
                self._take(channels.lose(channel, "this site is closing"))
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait([self._runner])
        self._resources.close()

    # --- the list of peers, while open -----------------------------------------------------------------------------

    def deny(self, peer: str) -> None:
        """Take the key of `peer` off the allow-list: its session ends, behind what was sent to it, and it is refused."""
        self._denied.add(peer)
        channels = self._peers[peer]
        for channel in sorted(channels.channels, key=lambda channel: channel is channels.in_use):
            self._take(
                channels.lose(channel, _revoked(peer))
            )  # the one in use last: no other takes its place

    def admit(self, peer: str) -> None:
        """Put the key of `peer` on the allow-list again."""
        self._denied.discard(peer)
        self._dials_change[peer].set()

    def move(self, peer: str, address: str | None) -> None:
        """`peer` listens at `address` now, or dials us (None). A session that there is goes on. Raises AddressError."""
        if address is not None:
            check_address(address, listen=False)
        self._endpoints[peer] = PeerEndpoint(self._endpoints[peer].public, address)
        channels = self._peers[peer]
        for channel in [c for c in channels.channels if c.dialled and not c.complete]:
            self._take(channels.lose(channel, f"the address of {peer} has changed"))
        self._dials_change[peer].set()

    # --- tasks -----------------------------------------------------------------------------------------------------

    async def _run(
        self,
        context: zmq.asyncio.Context,
        zap: zmq.asyncio.Socket,
        router: zmq.asyncio.Socket,
        monitor: zmq.asyncio.Socket,
    ) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._admit(zap), name="admit")
                tasks.create_task(self._watch_router(monitor), name="watch-router")
                tasks.create_task(self._read_router(router), name="read-router")
                tasks.create_task(self._keep_alive(), name="keep-alive")
                for peer in self._endpoints:
                    tasks.create_task(self._dial(context, peer), name=f"dial-{peer}")
        except Exception as error:  # whoever waits for an event must learn that none will come
            self._inbox.fail(error)
        finally:
            for channels in self._peers.values():
                channels.abandon()

    async def _admit(self, zap: zmq.asyncio.Socket) -> None:
        """Answer what libzmq asks about each new connection: is this key on the list?"""
        while True:
            _, request_id, _, address, _, _, key = await zap.recv_multipart()
            user_id = z85.encode(key)
            name = self._names.get(user_id)
            if name is None:
                who = f"{address.decode()} tried to connect with the key {key.hex()[:8]}…"
                self._refuse(
                    None, UnknownPeerError.reason, f"{who}, which is not on this site's list of peers"
                )
            elif name in self._denied:
                self._refuse(name, RevokedError.reason, _revoked(name))
            is_admitted = name is not None and name not in self._denied
            await answer_zap(zap, request_id, user_id if is_admitted else None)
            await asyncio.sleep(0)  # what is ready does not yield, and others want their turn

    async def _watch_router(self, monitor: zmq.asyncio.Socket) -> None:
        while True:
            await monitor.recv_multipart()
            why = "somebody tried to connect without encryption, or to a site with another key than ours"
            self._refuse(None, MalformedError.reason, why)
            await asyncio.sleep(0)  # as in `_admit`

    async def _read_router(self, router: zmq.asyncio.Socket) -> None:
        while True:
            await self._inbox.room()
            routing_id, *frames = await router.recv_multipart(copy=False)
            self._on_accepted(Route(router, (routing_id.bytes,)), frames)
            await asyncio.sleep(0)  # as in `_admit`

    async def _keep_alive(self) -> None:
        loop, timing = asyncio.get_running_loop(), self._timing
        while True:
            slept_from_s = loop.time()
            await asyncio.sleep(timing.keep_alive_s)
            now_s = loop.time()
            overslept = now_s - slept_from_s - timing.keep_alive_s > timing.silence_timeout_s / 2
            self._refusals.flush(now_s)
            for channels in self._peers.values():
                for channel, lane in itertools.product(list(channels.channels), Lane):
                    self._put(channel, lane, [wire.KEEP])
                if overslept or self._inbox.full:
                    # Who was not read cannot have been heard: the silence is this process's own.
                    channels.forgive(now_s)
                else:
                    self._take(channels.expire(now_s, timing.silence_timeout_s))

    async def _dial(self, context: zmq.asyncio.Context, peer: str) -> None:
        """Keep a channel to `peer`, one dial after the other, while it has an address and is not denied."""
        backoff = Backoff(self._timing.min_redial_s, self._timing.max_redial_s, self._rng)
        last_refusal = told_refusal = None
        for attempt in itertools.count():
            while (address := self._endpoints[peer].address) is None or peer in self._denied:
                self._dials_change[peer].clear()
                await self._dials_change[peer].wait()
            dial = await self._dial_once(context, peer, address, attempt)
            # Told at the second time in a row: a peer that is just going down does not refuse us.
            if dial.refusal is None:
                told_refusal = None
            elif dial.refusal == last_refusal != told_refusal:
                self._refuse(peer, dial.reason, dial.refusal)
                told_refusal = dial.refusal
            last_refusal = dial.refusal
            if dial.channel.complete:
                backoff.reset()
            await asyncio.sleep(backoff.next_s())

    async def _dial_once(self, context: zmq.asyncio.Context, peer: str, address: str, attempt: int) -> _Dial:
        """Dial both lanes and serve them until the channel is dropped."""
        target = await resolve_address(address, attempt)
        dial = _Dial(self._make_channel(peer, os.urandom(wire.ID_BYTES), dialled=True))
        if target is None:
            dial.refusal, dial.reason = _unresolved(peer, address), UnresolvedError.reason
            return dial
        if peer in self._denied:  # since the name was looked up
            return dial
        channels = self._peers[peer]
        with ExitStack() as resources:
            self._dials[dial.channel] = dial
            resources.callback(self._dials.pop, dial.channel)
            channels.add(dial.channel)
            async with asyncio.TaskGroup() as tasks:
                workers = []
                for lane in Lane:
                    dealer = make_socket(resources, context, zmq.DEALER, self._identity, self._timing, target)
                    if lane is Lane.BULK:
                        dealer.linger = 0
                    dealer.curve_serverkey = z85.encode(self._endpoints[peer].public.curve_key)
                    dealer.reconnect_ivl = _NEVER_MS
                    monitor = monitor_socket(resources, dealer, zmq.EVENT_ALL)
                    workers.append(tasks.create_task(self._watch_dealer(dial, lane, dealer, monitor)))
                    workers.append(tasks.create_task(self._read_dealer(dial.channel, lane, dealer)))
                    dealer.connect(target)
                try:
                    await dial.over.wait()
                finally:  # also when the transport closes or fails: nobody may use these sockets any more
                    self._take(channels.lose(dial.channel, "this site is closing"))
                for worker in workers:
                    worker.cancel()
        return dial

    async def _watch_dealer(
        self, dial: _Dial, lane: Lane, dealer: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket
    ) -> None:
        channel, peer = dial.channel, dial.channel.peer
        channels, address = self._peers[peer], self._endpoints[peer].address
        while True:
            match parse_monitor_message(await monitor.recv_multipart())["event"]:
                case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    channel.routes[lane] = Route(dealer)
                    self._greet(channel, lane)
                case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    dial.refusal = f"{peer} at {address} does not know our key: add this site's public identity to its list"
                    self._take(channels.lose(channel, dial.refusal))
                case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                    dial.refusal = (
                        f"{address} answers, but not as {peer}: check the address, and that the public identity "
                        f"listed here for {peer} is the one that it uses"
                    )
                    self._take(channels.lose(channel, dial.refusal))
                case zmq.EVENT_CLOSED:
                    self._take(channels.lose(channel, f"nobody answers at {address}"))
                case zmq.EVENT_DISCONNECTED:
                    channel.broken = channel.broken or f"the connection with {peer} broke"

    async def _read_dealer(self, channel: Channel, lane: Lane, dealer: zmq.asyncio.Socket) -> None:
        while True:
            await self._inbox.room()
            frames = await dealer.recv_multipart(copy=False)
            self._num_received[channel.peer] += _num_bytes(frames) + FRAME_ENVELOPE_BYTES * len(frames)
            self._on_message(channel, lane, frames)
            await asyncio.sleep(0)  # as in `_admit`

    # --- what arrives ----------------------------------------------------------------------------------------------

    def _on_accepted(self, route: Route, frames: list[zmq.Frame]) -> None:
        """A message on the address that we listen on."""
        # The peer is the key that was admitted, whatever the routing id and the message say.
        peer = self._names[cast(str, frames[0].get("User-Id")).encode()]
        self._num_received[peer] += _num_bytes(frames) + FRAME_ENVELOPE_BYTES * len(frames)
        routing_id = route.prefix[0]
        known = self._accepted.get(routing_id)
        if (
            known is not None and known[0].peer != peer
        ):  # anybody may take a routing id whose connection is gone
            self._take(
                self._peers[known[0].peer].lose(known[0], f"the connection with {known[0].peer} broke")
            )
            known = None
        if known is not None:
            self._on_message(*known, frames)
            return
        if peer in self._denied:  # on a connection that was admitted before
            if routing_id not in self._former_routes:
                self._refuse(peer, RevokedError.reason, _revoked(peer))
            send_now(route, [wire.BYE])
            return
        header = self._decode_header(peer, frames)
        if isinstance(header, wire.Greeting):
            self._on_new_lane(peer, route, header)
        elif routing_id in self._former_routes:
            send_now(route, [wire.BYE])
        elif header is not None:
            self._refuse(peer, MalformedError.reason, f"{peer} sent a message before its greeting")

    def _on_new_lane(self, peer: str, route: Route, greeting: wire.Greeting) -> None:
        """A connection's greeting: it becomes a lane of a new channel, or of the one that its other lane has begun."""
        channels = self._peers[peer]
        same_dial = (c for c in channels.channels if not c.dialled and c.id == greeting.channel_id)
        channel = next(same_dial, None)
        if channel is None:
            channel = self._make_channel(peer, greeting.channel_id, dialled=False)
            channels.add(channel)
        elif greeting.lane in channel.routes:
            self._refuse(peer, MalformedError.reason, f"{peer} greeted twice on one lane")
            return
        channel.routes[greeting.lane] = route
        self._accepted[route.prefix[0]] = (channel, greeting.lane)
        steps = channels.greet(channel, greeting.lane, greeting.session)
        if channel in channels.channels:
            self._greet(channel, greeting.lane)  # before the steps: they may pick this channel
        self._take(steps)

    def _on_message(self, channel: Channel, lane: Lane, frames: list[zmq.Frame]) -> None:
        channels = self._peers[channel.peer]
        channel.heard_s = self._now_s()
        match self._decode_header(channel.peer, frames):
            case wire.Kind.DATA:
                if lane is Lane.BULK:
                    channel.receipts.receive(_num_bytes(frames[1:]))
                    self._send_receipt(channel)
                self._on_payload(channel, lane, frames[1:])
            case wire.Receipt(num_bytes):
                self._on_receipt(channel, num_bytes)
            case wire.Kind.PICK:
                self._take(channels.follow(channel))
            case wire.Kind.BYE if lane is Lane.CONTROL:
                self._take(channels.lose(channel, f"{channel.peer} closed the connection"))
            case wire.Kind.BYE:  # it may have overtaken last words on the control lane
                channel.broken = channel.broken or f"{channel.peer} closed the connection"
            case wire.Greeting(its_lane, session, channel_id):
                if channel.dialled and (its_lane, channel_id) == (lane, channel.id):
                    self._take(channels.greet(channel, lane, session))
                else:
                    self._refuse(channel.peer, MalformedError.reason, f"{channel.peer} greeted out of place")
            case _:
                pass  # a sign of life, or refused already

    def _on_payload(self, channel: Channel, lane: Lane, parts: list[zmq.Frame]) -> None:
        try:
            check_payload(lane, [len(part) for part in parts])
        except RefusedError as error:
            self._refuse(channel.peer, error.reason, f"{channel.peer} sent {error}")
            return
        if channel is self._peers[channel.peer].in_use:  # else it is late: its session is over
            self._inbox.put(Received(channel.peer, lane, tuple(map(_content, parts))))

    def _on_receipt(self, channel: Channel, num_bytes: int) -> None:
        try:
            channel.deliveries.acknowledge(num_bytes, self._now_s())
        except MalformedError as error:
            self._refuse(channel.peer, error.reason, f"{channel.peer} sent {error}")

    def _decode_header(
        self, peer: str, frames: list[zmq.Frame]
    ) -> wire.Kind | wire.Greeting | wire.Receipt | None:
        """The header, or None after refusing it."""
        try:
            return wire.decode_header(bytes(frames[0].buffer[: wire.MAX_HEADER_BYTES + 1]))
        except RefusedError as error:
            self._refuse(peer, error.reason, f"{peer} sent {error}")
            return None

    # --- what leaves -----------------------------------------------------------------------------------------------

    def _take(self, steps: Iterable[Step]) -> None:
        """Do what `PeerChannels` decided."""
        for step in steps:
            match step:
                case Pick(channel):
                    if not all(self._put(channel, lane, [wire.PICK]) for lane in Lane):
                        channel.broken = channel.broken or f"{channel.peer} does not take what it is sent"
                case Drop(channel):
                    self._say_bye(channel)
                    if channel.dialled:
                        self._dials[channel].over.set()
                    for routing_id in (i for route in channel.routes.values() for i in route.prefix):
                        self._accepted.pop(routing_id, None)
                        self._former_routes.append(routing_id)
                case Rejected(peer, reason, why):
                    self._refuse(peer, reason, why)
                case _:
                    self._inbox.put(step)

    def _put(self, channel: Channel, lane: Lane, frames: Sequence[bytes]) -> bool:
        """Queue a message on a lane of `channel`; False when the lane is not there or its queue is full."""
        if lane not in channel.routes or channel.broken:
            return False
        failure = send_now(channel.routes[lane], frames)
        if failure is None:
            self._num_sent[channel.peer] += sum(map(len, frames)) + FRAME_ENVELOPE_BYTES * len(frames)
        elif failure == errno.EHOSTUNREACH:
            channel.broken = channel.broken or f"the connection with {channel.peer} broke"
        return failure is None

    def _send_receipt(self, channel: Channel) -> None:
        """Tell the peer what has arrived, now or soon."""
        if channel.receipt_is_due or channel not in self._peers[channel.peer].channels:
            return
        wait_s = channel.receipts.wait_s(self._now_s())
        if wait_s == 0.0:
            receipt = wire.encode_receipt(wire.Receipt(channel.receipts.num_bytes))
            if self._put(channel, Lane.CONTROL, [receipt]):
                channel.receipts.tell(self._now_s())
                return
            wait_s = RECEIPT_INTERVAL_S  # there was no room for it
        if wait_s is not None:
            channel.receipt_is_due = True
            asyncio.get_running_loop().call_later(wait_s, self._send_due_receipt, channel)

    def _send_due_receipt(self, channel: Channel) -> None:
        channel.receipt_is_due = False
        self._send_receipt(channel)

    def _make_channel(self, peer: str, channel_id: bytes, *, dialled: bool) -> Channel:
        deliveries = Deliveries(self._links[peer])
        return Channel(peer, channel_id, dialled, heard_s=self._now_s(), deliveries=deliveries)

    def _greet(self, channel: Channel, lane: Lane) -> None:
        self._put(channel, lane, [wire.encode_greeting(wire.Greeting(lane, self._session, channel.id))])

    def _say_bye(self, channel: Channel) -> None:
        # Behind the last control payload: on the bulk lane it would overtake that.
        self._put(channel, Lane.CONTROL if Lane.CONTROL in channel.routes else Lane.BULK, [wire.BYE])

    def _refuse(self, peer: str | None, reason: str, why: str) -> None:
        self._refusals.note(peer, reason, why, self._now_s())

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()


def _content(frame: zmq.Frame) -> bytes:
    """What a part holds. A large one is not copied: what it is needed for (hash, write) takes a view as well."""
    return frame.bytes if len(frame) < _MIN_VIEW_BYTES else cast(bytes, frame.buffer)


def _num_bytes(frames: Iterable[zmq.Frame]) -> int:
    return sum(map(len, frames))


def _revoked(peer: str) -> str:
    return f"the key of {peer} is revoked here"


def _unresolved(peer: str, address: str) -> str:
    host, _ = split_address(address)
    return f"the host name {host!r} of {peer} does not resolve: check the address of {peer} and this machine's name server"
