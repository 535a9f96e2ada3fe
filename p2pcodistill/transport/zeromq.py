"""The transport between sites: ZeroMQ over TCP, encrypted and authenticated by CURVE on both sides.

A transport listens on one ROUTER, and dials the peers whose addresses are known (`dialling`). An allow-list, asked by libzmq
for every connection (ZAP), admits only members' keys. Whoever sends is the key that the list admitted (`User-Id`
in the metadata of each frame), whatever routing id or greeting comes with it.

`channels` decides which channel carries the session, `lanes` says and hears what belongs to that; this module has the
address that is listened on, and the tasks. libzmq refuses frames over the cap before it allocates them, but collects all
frames of a message before it hands them over: a *member* could fill memory with an endless one. Strangers do not get that
far.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack

import zmq
import zmq.asyncio
from zmq.utils import z85

from p2pcodistill.errors import AddressError, MalformedError, RevokedError, UnknownPeerError
from p2pcodistill.gossip.messages import Lane
from p2pcodistill.identity import Identity
from p2pcodistill.transport.base import Traffic, TransportEvent, check_address, check_sendable
from p2pcodistill.transport.dialling import Dialler, PeerEndpoint
from p2pcodistill.transport.inbox import Inbox
from p2pcodistill.transport.lanes import Lanes, revoked
from p2pcodistill.transport.refusals import RefusalLog
from p2pcodistill.transport.sockets import (
    Route,
    Timing,
    answer_zap,
    bind_socket,
    make_socket,
    monitor_socket,
    open_zap,
    receive_now,
)

__all__ = ["MAX_INBOX_BYTES", "PeerEndpoint", "ZeroMQTransport"]

MAX_INBOX_BYTES = 8 << 20


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
        self._timing = timing or Timing()
        self._inbox = Inbox(MAX_INBOX_BYTES)
        self._refusals = RefusalLog(self._inbox.put, self._timing.refusal_interval_s)
        keys = {name: peer.public for name, peer in peers.items()}
        self._lanes = Lanes(identity, keys, self._inbox, self._refusals, denied=denied)
        self._dialler = Dialler(
            identity, self._endpoints, self._lanes, self._inbox, self._timing, rng or random.Random()
        )
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
        channel = self._lanes.peers[peer].in_use
        check_sendable(lane, payload)
        if channel is None or self._inbox.has_news_of(peer):
            return False
        return self._lanes.put_payload(channel, lane, payload)

    def traffic(self) -> Mapping[str, Traffic]:
        """See `Transport.traffic`."""
        return {peer: self._lanes.traffic_of(peer) for peer in self._lanes.peers}

    async def close(self) -> None:
        """See `Transport.close`. Holds the loop for at most `Timing.flush_s`, if a peer does not take its last messages."""
        self._inbox.fail(RuntimeError("the transport is closed"))
        for peer in self._lanes.peers:
            self._lose_all(peer, "this site is closing")
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait([self._runner])
        self._resources.close()

    # --- the list of peers, while open -----------------------------------------------------------------------------

    def deny(self, peer: str) -> None:
        """Take the key of `peer` off the allow-list: its session ends, behind what was sent to it, and it is refused."""
        self._lanes.denied.add(peer)
        self._lose_all(peer, revoked(peer))

    def _lose_all(self, peer: str, why: str) -> None:
        channels = self._lanes.peers[peer]
        # The one in use last: no other takes its place, and the peer does not move there before it has read the last words.
        for channel in sorted(channels.channels, key=lambda channel: channel is channels.in_use):
            self._lanes.lose(channel, why)

    def admit(self, peer: str) -> None:
        """Put the key of `peer` on the allow-list again."""
        self._lanes.denied.discard(peer)
        self._dialler.note_change(peer)

    def move(self, peer: str, address: str | None) -> None:
        """`peer` listens at `address` now, or dials us (None). A session that there is goes on. Raises AddressError."""
        if address is not None:
            check_address(address, listen=False)
        self._endpoints[peer] = PeerEndpoint(self._endpoints[peer].public, address)
        for channel in list(self._lanes.peers[peer].channels):
            if channel.dialled and not channel.complete:
                self._lanes.lose(channel, f"the address of {peer} has changed")
        self._dialler.note_change(peer)

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
                    tasks.create_task(self._dialler.keep_dialling(context, peer), name=f"dial-{peer}")
        except Exception as error:  # whoever waits for an event must learn that none will come
            self._inbox.fail(error)
        finally:
            for channels in self._lanes.peers.values():
                channels.abandon()

    async def _admit(self, zap: zmq.asyncio.Socket) -> None:
        """Answer what libzmq asks about each new connection: is this key on the list?"""
        while True:
            _, request_id, _, address, _, _, key = await zap.recv_multipart()
            user_id = z85.encode(key)
            name = self._lanes.name_of(user_id)
            if name is None:
                who = f"{address.decode()} tried to connect with the key {key.hex()[:8]}…"
                why = f"{who}, which is not on this site's list of peers"
                self._lanes.refuse(None, UnknownPeerError.reason, why)
            elif name in self._lanes.denied:
                self._lanes.refuse(name, RevokedError.reason, revoked(name))
            is_admitted = name is not None and name not in self._lanes.denied
            await answer_zap(zap, request_id, user_id if is_admitted else None)
            await asyncio.sleep(0)  # what is ready does not yield, and others want their turn

    async def _watch_router(self, monitor: zmq.asyncio.Socket) -> None:
        while True:
            await monitor.recv_multipart()
            why = "somebody tried to connect without encryption, or to a site with another key than ours"
            self._lanes.refuse(None, MalformedError.reason, why)
            await asyncio.sleep(0)  # as in `_admit`

    async def _read_router(self, router: zmq.asyncio.Socket) -> None:
        while True:
            await self._inbox.room()
            routing_id, *frames = await router.recv_multipart(copy=False)
            self._lanes.hear_accepted(Route(router, (routing_id.bytes,)), frames)
            for routing_id, *frames in receive_now(router):
                self._lanes.hear_accepted(Route(router, (routing_id.bytes,)), frames)
                if self._inbox.full:
                    break
            await asyncio.sleep(0)  # as in `_admit`

    async def _keep_alive(self) -> None:
        loop, timing = asyncio.get_running_loop(), self._timing
        while True:
            slept_from_s = loop.time()
            await asyncio.sleep(timing.keep_alive_s)
            now_s = loop.time()
            overslept = now_s - slept_from_s - timing.keep_alive_s > timing.silence_timeout_s / 2
            self._refusals.flush(now_s)
            self._lanes.keep_alive()
            for channels in self._lanes.peers.values():
                if overslept or self._inbox.full:
                    # Who was not read cannot have been heard: the silence is this process's own.
                    channels.forgive(now_s)
                else:
                    self._lanes.take(channels.expire(now_s, timing.silence_timeout_s))
