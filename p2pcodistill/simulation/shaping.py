"""A link between two sites as it could be: a TCP relay on loopback that is slow, far, lossy, cut, or dark.

All connections of a link share its bandwidth, a direction each, as the two lanes of the transport share a wide-area link.
What enters a direction is serialised at the bandwidth, then travels for the latency. What is on its way, and what waits for
its turn, is at most one bandwidth-delay product, as in a well-sized router: beyond that the relay stops reading, and TCP
pushes back on the sender. Bandwidth counts payload; headers are left out.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p2pcodistill.transport.base import split_address

if TYPE_CHECKING:
    from p2pcodistill.simulation.link_config import LinkConfig

PACKET_BYTES = 1460
"""What is lost together, and the largest segment on a link of limited bandwidth."""
_UNLIMITED_MBIT = 1000.0
"""Sizes the buffer of a link whose bandwidth is not limited."""
_MIN_QUEUE_S = 0.02
"""What a direction buffers at least, as time at its bandwidth: timers are coarse."""
_PIECE_S = 0.005
_MAX_PIECE_BYTES = 64 << 10
_MIN_RESEND_S = 0.02
"""What a lost packet costs at least, however short the link."""


@dataclass(frozen=True, slots=True)
class LinkShape:
    """What a link can carry, in each direction; by default it is perfect."""

    bandwidth_mbit: float | None = None
    """Megabits of payload per second; None: unlimited."""
    latency_ms: float = 0.0
    """One way."""
    jitter_ms: float = 0.0
    """Random part of the delay, uniform between 0 and this, on top of `latency_ms`. Order is kept."""
    loss_ratio: float = 0.0
    """Share of packets that are lost and sent again: each costs its bandwidth twice, and a round trip."""
    reset_interval_s: float | None = None
    """All connections are reset this often; None: never."""

    @classmethod
    def from_config(cls, config: LinkConfig) -> LinkShape:
        """The shape of a link of a scenario."""
        return cls(
            config.bandwidth_mbit,
            config.latency_ms,
            config.jitter_ms,
            config.loss_ratio,
            config.reset_interval_s,
        )

    @property
    def delay_s(self) -> float:
        """One way of an empty link, jitter at its mean."""
        return (self.latency_ms + self.jitter_ms / 2) / 1e3

    @property
    def round_trip_s(self) -> float:
        """Both ways of an empty link of this shape."""
        return 2 * self.delay_s

    @property
    def bytes_per_s(self) -> float | None:
        """The bandwidth; None: unlimited."""
        return None if self.bandwidth_mbit is None else self.bandwidth_mbit * 1e6 / 8

    @property
    def buffer_bytes(self) -> int:
        """What a direction holds at most: one bandwidth-delay product, and no less than a few packets."""
        bytes_per_s = self.bytes_per_s or _UNLIMITED_MBIT * 1e6 / 8
        return max(int(bytes_per_s * max(self.round_trip_s, _MIN_QUEUE_S)), 2 * PACKET_BYTES)

    @property
    def piece_bytes(self) -> int:
        """How much of one connection is read at a time."""
        bytes_per_s = self.bytes_per_s or _UNLIMITED_MBIT * 1e6 / 8
        return min(max(int(bytes_per_s * _PIECE_S), PACKET_BYTES), _MAX_PIECE_BYTES)


class Direction:
    """One direction of a link: who may put bytes on it, and when these arrive."""

    def __init__(self, shape: LinkShape, rng: random.Random) -> None:
        self.shape = shape
        self._rng = rng
        self._idle_from_s = 0.0
        self._num_bytes_held = 0
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()
        self.num_bytes_forwarded = 0

    async def room(self) -> None:
        """Wait until there is room for a piece; connections that wait take turns."""
        async with self._turn:
            while self._num_bytes_held >= self.shape.buffer_bytes:
                self._released.clear()
                await self._released.wait()

    def put(self, num_bytes: int, now_s: float) -> float:
        """Put a piece on the link; when it arrives at the other end."""
        num_lost, num_rounds = self._lose(-(-num_bytes // PACKET_BYTES))
        self._num_bytes_held += num_bytes
        self._idle_from_s = max(now_s, self._idle_from_s)
        if bytes_per_s := self.shape.bytes_per_s:
            self._idle_from_s += (num_bytes + num_lost * PACKET_BYTES) / bytes_per_s
        delay_s = (self.shape.latency_ms + self._rng.random() * self.shape.jitter_ms) / 1e3
        return self._idle_from_s + delay_s + num_rounds * max(self.shape.round_trip_s, _MIN_RESEND_S)

    def release(self, num_bytes: int) -> None:
        """A piece has left the link."""
        self._num_bytes_held -= num_bytes
        self._released.set()

    def _lose(self, num_packets: int) -> tuple[int, int]:
        """(packets lost, times that one of them was sent again before all had arrived)."""
        num_lost = num_rounds = 0
        while self.shape.loss_ratio and num_packets:
            num_packets = sum(self._rng.random() < self.shape.loss_ratio for _ in range(num_packets))
            num_lost += num_packets
            num_rounds += num_packets > 0
        return num_lost, num_rounds


class ShapedLink:
    """The link to `target` (`tcp://HOST:PORT`, an IP address) through a relay on loopback, with faults to order.

    Open and close it once, within one event loop. `shape` is that of the way to the target, `back` that of the way from it:
    the same by default. `seed` decides jitter and losses. `num_bytes_forwarded` counts both directions, `num_cuts`
    connections that were reset, by order or every `reset_interval_s` of `shape`, `num_swallowed` what a black hole kept from
    arriving: pieces, and attempts to connect.
    """

    def __init__(
        self,
        target: str,
        shape: LinkShape,
        *,
        back: LinkShape | None = None,
        seed: int = 0,
        make_near: Callable[[], socket.socket] = socket.socket,
        make_far: Callable[[], socket.socket] = socket.socket,
    ) -> None:
        """`make_near` makes the socket that listens, on loopback, `make_far` those that connect to the target."""
        self._make_near, self._make_far = make_near, make_far
        self._target = split_address(target)
        self._reset_interval_s = shape.reset_interval_s
        rng = random.Random(seed)
        self._there = Direction(shape, random.Random(rng.getrandbits(64)))
        self._back = Direction(back or shape, random.Random(rng.getrandbits(64)))
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
        self._is_blocked = False
        self._is_lit = asyncio.Event()
        self._is_lit.set()
        self.num_cuts = 0
        self.num_swallowed = 0

    @property
    def num_bytes_forwarded(self) -> int:
        """Payload that reached its end, in both directions."""
        return self._there.num_bytes_forwarded + self._back.num_bytes_forwarded

    async def open(self) -> str:
        """Begin to relay; the address to dial instead of the target's."""
        listener = self._listener = self._make_near()
        _prepare(listener, reads=self._there.shape, writes=self._back.shape)
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        self._spawn(self._accept(listener))
        if self._reset_interval_s is not None:
            self._spawn(self._cut_every(self._reset_interval_s))
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    def cut(self) -> None:
        """Reset all connections (TCP RST at both ends); new ones are accepted."""
        for connection in self._connections:
            if not connection.cancelling():
                connection.cancel()
                self.num_cuts += 1

    def block(self) -> None:
        """Partition: all connections are reset, and new ones as soon as they are made."""
        self._is_blocked = True
        self.cut()

    def unblock(self) -> None:
        """Heal the partition."""
        self._is_blocked = False

    def black_hole(self, is_dark: bool) -> None:
        """While dark, nothing arrives at either end and connections stay, as on a link that swallows every packet.

        Afterwards they go on where they were, as TCP would by sending again.
        """
        if is_dark:
            self._is_lit.clear()
        else:
            self._is_lit.set()

    async def close(self) -> None:
        """Reset what is connected and stop listening; calling it again does nothing."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _end(self, connection: asyncio.Task[None]) -> None:
        near = self._connections.pop(connection)
        if near.fileno() != -1:  # cut before its task had begun
            _reset(near)

    async def _cut_every(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            self.cut()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            end, _ = await loop.sock_accept(listener)
            if self._is_blocked:
                _reset(end)
            else:
                connection = self._spawn(self._relay(end))
                self._connections[connection] = end
                connection.add_done_callback(self._end)

    async def _relay(self, near: socket.socket) -> None:
        """One connection, until both ends have closed it or one is gone; then, or when cancelled, none is left of it."""
        far = self._make_far()
        is_clean = False
        try:
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _prepare(far, reads=self._back.shape, writes=self._there.shape)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.sleep(self._there.shape.delay_s + self._back.shape.delay_s)  # TCP's handshake
            await self._light()
            await asyncio.get_running_loop().sock_connect(far, self._target)
            async with asyncio.TaskGroup() as both:
                there = both.create_task(self._forward(near, far, self._there))
                back = both.create_task(self._forward(far, near, self._back))
            is_clean = there.result() and back.result()
        except* OSError:  # the target does not listen, or an end is gone
            await self._is_lit.wait()
        finally:
            for end in (near, far):
                if is_clean:
                    end.close()
                else:
                    _reset(end)

    async def _light(self) -> None:
        """Wait until nothing is swallowed any more."""
        self.num_swallowed += not self._is_lit.is_set()
        await self._is_lit.wait()

    async def _forward(self, source: socket.socket, sink: socket.socket, direction: Direction) -> bool:
        """One direction of a connection, until its end; False when the sink was gone before.

        Raises ConnectionResetError once it has delivered what the source sent before it was reset.
        """
        on_the_way: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue()
        taking = asyncio.create_task(self._take(source, direction, on_the_way))
        try:
            return await self._deliver(on_the_way, sink, direction)
        finally:
            taking.cancel()
            await asyncio.wait([taking])
            while not on_the_way.empty():
                direction.release(len(on_the_way.get_nowait()[1] or b""))

    async def _take(
        self,
        source: socket.socket,
        direction: Direction,
        on_the_way: asyncio.Queue[tuple[float, bytes | None]],
    ) -> None:
        """Put what the source sends on its way; in the end b"" when it closed, None when it was reset."""
        loop = asyncio.get_running_loop()
        arrival_s = 0.0
        data: bytes | None = b"more"
        while data:
            await direction.room()
            try:
                data = await loop.sock_recv(source, direction.shape.piece_bytes)
            except OSError:
                data = None
            arrival_s = max(arrival_s, direction.put(len(data or b""), loop.time()))
            on_the_way.put_nowait((arrival_s, data))

    async def _deliver(
        self,
        on_the_way: asyncio.Queue[tuple[float, bytes | None]],
        sink: socket.socket,
        direction: Direction,
    ) -> bool:
        loop = asyncio.get_running_loop()
        while True:
            arrival_s, data = await on_the_way.get()
            try:
                await asyncio.sleep(max(0.0, arrival_s - loop.time()))
                await self._light()
                if data is None:
                    raise ConnectionResetError("the source was reset")
                if not data:
                    with suppress(OSError):  # it may be gone already
                        sink.shutdown(socket.SHUT_WR)
                    return True
                try:
                    await loop.sock_sendall(sink, data)
                except OSError:  # what it sent before it was gone is still to arrive, the other way
                    return False
                direction.num_bytes_forwarded += len(data)
            finally:
                direction.release(len(data or b""))


def _prepare(end: socket.socket, *, reads: LinkShape, writes: LinkShape) -> None:
    """Keep the kernel from buffering what the link does not hold (sizes are inherited by accepted connections)."""
    end.setblocking(False)
    for shape, option in ((reads, socket.SO_RCVBUF), (writes, socket.SO_SNDBUF)):
        if shape.bandwidth_mbit is not None:
            end.setsockopt(socket.SOL_SOCKET, option, max(4 * shape.piece_bytes, 16 << 10))
            # Loopback's segments of 64 KiB would not fit into such a window, and TCP stalls where none fits.
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, PACKET_BYTES)


def _reset(end: socket.socket) -> None:
    """Close with a TCP RST, which tells the other end that the connection broke."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
