"""What is said and heard on the lanes of every channel: greetings, payloads, receipts, signs of life.

`channels` decides which channel carries the session, `wire` holds the bytes of what is said beneath the payloads; this
module does it. Messages are brought by `zeromq`, from the address that is listened on, and by `dialling`.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

import zmq
from zmq.utils import z85

from p2pcodistill.errors import MalformedError, RefusedError, RevokedError
from p2pcodistill.gossip.messages import Lane
from p2pcodistill.gossip.window import LinkEstimate
from p2pcodistill.identity import Identity, PublicIdentity
from p2pcodistill.transport import wire
from p2pcodistill.transport.base import Received, Rejected, Traffic, check_payload
from p2pcodistill.transport.channels import Channel, Drop, PeerChannels, Pick, Step
from p2pcodistill.transport.inbox import Inbox
from p2pcodistill.transport.receipts import RECEIPT_INTERVAL_S, Deliveries
from p2pcodistill.transport.refusals import RefusalLog
from p2pcodistill.transport.sockets import Route, send_now

FRAME_ENVELOPE_BYTES = 42
"""What CURVE and ZMTP add to each part of a message (7 less for one below 256 bytes)."""
_MAX_FORMER_ROUTES = 64
_MIN_VIEW_BYTES = 32 << 10


class Lanes:
    """The channels with `peers` (name -> keys). What arrives for the node goes to `inbox`, what is refused to `refusals`.

    To be used within one event loop. `denied` are the peers that are not heard.
    """

    def __init__(
        self,
        identity: Identity,
        peers: Mapping[str, PublicIdentity],
        inbox: Inbox,
        refusals: RefusalLog,
        *,
        denied: Collection[str],
    ) -> None:
        own_key = identity.public.curve_key
        self.peers = {
            name: PeerChannels(name, leads=own_key < keys.curve_key) for name, keys in peers.items()
        }
        self.denied = set(denied)
        self._names = {z85.encode(keys.curve_key): name for name, keys in peers.items()}
        self._inbox, self._refusals = inbox, refusals
        self._links = {name: LinkEstimate() for name in peers}
        self._session = os.urandom(wire.ID_BYTES)
        self._accepted: dict[bytes, tuple[Channel, Lane]] = {}
        self._former_routes: deque[bytes] = deque(maxlen=_MAX_FORMER_ROUTES)
        self._dialled: dict[Channel, asyncio.Event] = {}
        self._num_sent: Counter[str] = Counter()
        self._num_received: Counter[str] = Counter()

    def name_of(self, user_id: bytes) -> str | None:
        """The peer with this key, as ZAP and the metadata of frames spell it."""
        return self._names.get(user_id)

    def traffic_of(self, peer: str) -> Traffic:
        """The bytes moved between this site and `peer` so far."""
        channel, link = self.peers[peer].in_use, self._links[peer]
        num_under_way = channel.deliveries.num_under_way_bytes if channel else 0
        return Traffic(
            self._num_sent[peer],
            self._num_received[peer],
            num_under_way,
            link.rate_bytes_s,
            link.round_trip_s,
        )

    def refuse(self, peer: str | None, reason: str, why: str) -> None:
        """Tell of something that was refused."""
        self._refusals.note(peer, reason, why, self._now_s())

    # --- what arrives ------------------------------------------------------------------------------------------------

    def dial(self, peer: str) -> tuple[Channel, asyncio.Event]:
        """Begin a channel whose connections this side makes. The event is set once it was dropped."""
        channel = self._make_channel(peer, os.urandom(wire.ID_BYTES), dialled=True)
        over = self._dialled[channel] = asyncio.Event()
        self.peers[peer].add(channel)
        return channel, over

    def hear(self, channel: Channel, lane: Lane, frames: list[zmq.Frame]) -> None:
        """A message on a connection that this side has made."""
        self._num_received[channel.peer] += _num_bytes(frames) + FRAME_ENVELOPE_BYTES * len(frames)
        self._on_message(channel, lane, frames)

    def hear_accepted(self, route: Route, frames: list[zmq.Frame]) -> None:
        """A message on the address that we listen on."""
        # The peer is the key that was admitted, whatever the routing id and the message say.
        peer = self._names[cast(str, frames[0].get("User-Id")).encode()]
        self._num_received[peer] += _num_bytes(frames) + FRAME_ENVELOPE_BYTES * len(frames)
        routing_id = route.prefix[0]
        known = self._accepted.get(routing_id)
        if known is not None and known[0].peer != peer:  # anybody may take a routing id that is free again
            self.lose(known[0], f"the connection with {known[0].peer} broke")
            known = None
        if known is not None:
            self._on_message(*known, frames)
            return
        if peer in self.denied:  # on a connection that was admitted before
            if routing_id not in self._former_routes:
                self.refuse(peer, RevokedError.reason, revoked(peer))
            send_now(route, [wire.BYE])
            return
        header = self._decode_header(peer, frames)
        if isinstance(header, wire.Greeting):
            self._on_new_lane(peer, route, header)
        elif routing_id in self._former_routes:
            send_now(route, [wire.BYE])
        elif header is not None:
            self.refuse(peer, MalformedError.reason, f"{peer} sent a message before its greeting")

    def _on_new_lane(self, peer: str, route: Route, greeting: wire.Greeting) -> None:
        """A connection's greeting: it becomes a lane of a new channel, or of the one that its other lane has begun."""
        channels = self.peers[peer]
        same_dial = (c for c in channels.channels if not c.dialled and c.id == greeting.channel_id)
        channel = next(same_dial, None)
        if channel is None:
            channel = self._make_channel(peer, greeting.channel_id, dialled=False)
            channels.add(channel)
        elif greeting.lane in channel.routes:
            self.refuse(peer, MalformedError.reason, f"{peer} greeted twice on one lane")
            return
        channel.routes[greeting.lane] = route
        self._accepted[route.prefix[0]] = (channel, greeting.lane)
        steps = channels.greet(channel, greeting.lane, greeting.session)
        if channel in channels.channels:
            self.greet(channel, greeting.lane)  # before the steps: they may pick this channel
        self.take(steps)

    def _on_message(self, channel: Channel, lane: Lane, frames: list[zmq.Frame]) -> None:
        channels = self.peers[channel.peer]
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
                self.take(channels.follow(channel))
            case wire.Kind.BYE if lane is Lane.CONTROL:
                self.lose(channel, f"{channel.peer} closed the connection")
            case wire.Kind.BYE:  # it may have overtaken last words on the control lane
                channel.broken = channel.broken or f"{channel.peer} closed the connection"
            case wire.Greeting(its_lane, session, channel_id):
                if channel.dialled and (its_lane, channel_id) == (lane, channel.id):
                    self.take(channels.greet(channel, lane, session))
                else:
                    self.refuse(channel.peer, MalformedError.reason, f"{channel.peer} greeted out of place")
            case _:
                pass  # a sign of life, or refused already

    def _on_payload(self, channel: Channel, lane: Lane, parts: list[zmq.Frame]) -> None:
        try:
            check_payload(lane, [len(part) for part in parts])
        except RefusedError as error:
            self.refuse(channel.peer, error.reason, f"{channel.peer} sent {error}")
            return
        if channel is self.peers[channel.peer].in_use:  # else it is late: its session is over
            self._inbox.put(Received(channel.peer, lane, tuple(_content(lane, part) for part in parts)))

    def _on_receipt(self, channel: Channel, num_bytes: int) -> None:
        try:
            channel.deliveries.acknowledge(num_bytes, self._now_s())
        except MalformedError as error:
            self.refuse(channel.peer, error.reason, f"{channel.peer} sent {error}")

    def _decode_header(
        self, peer: str, frames: list[zmq.Frame]
    ) -> wire.Kind | wire.Greeting | wire.Receipt | None:
        """The header, or None after refusing it."""
        try:
            return wire.decode_header(bytes(frames[0].buffer[: wire.MAX_HEADER_BYTES + 1]))
        except RefusedError as error:
            self.refuse(peer, error.reason, f"{peer} sent {error}")
            return None

    # --- what leaves -------------------------------------------------------------------------------------------------

    def put(self, channel: Channel, lane: Lane, frames: Sequence[bytes]) -> bool:
        """Queue a message on a lane of `channel`; False when the lane is not there or its queue is full."""
        if lane not in channel.routes or channel.broken:
            return False
        failure = send_now(channel.routes[lane], frames)
        if failure is None:
            self._num_sent[channel.peer] += sum(map(len, frames)) + FRAME_ENVELOPE_BYTES * len(frames)
        elif failure == errno.EHOSTUNREACH:
            channel.broken = channel.broken or f"the connection with {channel.peer} broke"
        return failure is None

    def put_payload(self, channel: Channel, lane: Lane, payload: Sequence[bytes]) -> bool:
        """Queue a payload. False when there is no room for it; for a control payload that ends the channel."""
        num_bytes = sum(map(len, payload))
        if lane is Lane.BULK and not channel.deliveries.has_room(num_bytes):
            return False
        is_sent = self.put(channel, lane, [wire.DATA, *payload])
        if is_sent and lane is Lane.BULK:
            channel.deliveries.send(num_bytes, self._now_s())
        if not is_sent and lane is Lane.CONTROL:
            channel.broken = channel.broken or f"{channel.peer} does not take what it is sent"
        return is_sent

    def greet(self, channel: Channel, lane: Lane) -> None:
        """Say the first word on a lane."""
        self.put(channel, lane, [wire.encode_greeting(wire.Greeting(lane, self._session, channel.id))])

    def keep_alive(self) -> None:
        """Give a sign of life on every lane."""
        for channels in self.peers.values():
            for channel, lane in itertools.product(list(channels.channels), Lane):
                self.put(channel, lane, [wire.KEEP])

    def lose(self, channel: Channel, why: str) -> None:
        """`channel` is gone or given up."""
        self.take(self.peers[channel.peer].lose(channel, why))

    def take(self, steps: Iterable[Step]) -> None:
        """Do what `PeerChannels` decided."""
        for step in steps:
            match step:
                case Pick(channel):
                    if not all(self.put(channel, lane, [wire.PICK]) for lane in Lane):
                        channel.broken = channel.broken or f"{channel.peer} does not take what it is sent"
                case Drop(channel):
                    self._say_bye(channel)
                    if channel.dialled:
                        self._dialled.pop(channel).set()
                    for routing_id in (i for route in channel.routes.values() for i in route.prefix):
                        self._accepted.pop(routing_id, None)
                        self._former_routes.append(routing_id)
                case Rejected(peer, reason, why):
                    self.refuse(peer, reason, why)
                case _:
                    self._inbox.put(step)

    def _send_receipt(self, channel: Channel) -> None:
        """Tell the peer what has arrived, now or soon."""
        if channel.receipt_is_due or channel not in self.peers[channel.peer].channels:
            return
        wait_s = channel.receipts.wait_s(self._now_s())
        if wait_s == 0.0:
            receipt = wire.encode_receipt(wire.Receipt(channel.receipts.num_bytes))
            if self.put(channel, Lane.CONTROL, [receipt]):
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

    def _say_bye(self, channel: Channel) -> None:
        # Behind the last control payload: on the bulk lane it would overtake that.
        self.put(channel, Lane.CONTROL if Lane.CONTROL in channel.routes else Lane.BULK, [wire.BYE])

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()


def revoked(peer: str) -> str:
    """Why a peer is not heard whose key was taken off the list."""
    return f"the key of {peer} is revoked here"


def _content(lane: Lane, frame: zmq.Frame) -> bytes:
    """What a part holds. A large one of the bulk lane is not copied: what it is needed for (hash, write) takes a view."""
    if lane is Lane.CONTROL or len(frame) < _MIN_VIEW_BYTES:
        return frame.bytes
    return cast(bytes, frame.buffer.toreadonly())


def _num_bytes(frames: Iterable[zmq.Frame]) -> int:
    return sum(map(len, frames))
