"""What has arrived and waits for `receive`: control before bulk, bounded in bytes."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

from p2pcodistill.gossip.messages import Lane
from p2pcodistill.transport.base import Closed, Opened, Received, TransportEvent

EVENT_OVERHEAD_BYTES = 256
"""What an event counts for beyond its payload, so that many small ones are bounded too."""


class Inbox:
    """A queue of events between a transport and the one task that calls its `receive`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._first: deque[TransportEvent] = deque()
        self._bulk: deque[Received] = deque()
        self._num_news: Counter[str] = Counter()
        self._failure: Exception | None = None
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    @property
    def full(self) -> bool:
        """Whether those who put should wait for `room`."""
        return not self._room.is_set()

    def has_news_of(self, peer: str) -> bool:
        """Whether a session with `peer` has begun or ended and nobody has received that yet: whoever sends now means another
        session than the one there is."""
        return self._num_news[peer] > 0

    async def room(self) -> None:
        """Return when there is room for more. Each waiter may then put one event, whatever its size."""
        await self._room.wait()

    def put(self, event: TransportEvent) -> None:
        """Add an event; never refuses. A `Closed` drops the bulk of its peer that nobody has received."""
        if isinstance(event, Received) and event.lane is Lane.BULK:
            self._bulk.append(event)
        else:
            if isinstance(event, Closed):
                self._drop_bulk(event.peer)
            if isinstance(event, Opened | Closed):
                self._num_news[event.peer] += 1
            self._first.append(event)
        self._account(_size_bytes(event))
        self._changed.set()

    async def get(self) -> TransportEvent:
        """The next event: in order of arrival, but all else before bulk. Raises the exception given to `fail`."""
        while True:
            if self._failure is not None:
                raise self._failure
            if self._first or self._bulk:
                event = self._first.popleft() if self._first else self._bulk.popleft()
                self._account(-_size_bytes(event))
                if isinstance(event, Opened | Closed):
                    self._num_news[event.peer] -= 1
                return event
            self._changed.clear()
            await self._changed.wait()

    def fail(self, failure: Exception) -> None:
        """Let `get` raise `failure` from now on. The first failure stays."""
        self._failure = self._failure or failure
        self._changed.set()

    def _drop_bulk(self, peer: str) -> None:
        dropped = [event for event in self._bulk if event.peer == peer]
        self._bulk = deque(event for event in self._bulk if event.peer != peer)
        self._account(-sum(map(_size_bytes, dropped)))

    def _account(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes >= self._max_bytes:
            self._room.clear()
        else:
            self._room.set()


def _size_bytes(event: TransportEvent) -> int:
    payload_bytes = sum(map(len, event.payload)) if isinstance(event, Received) else 0
    return EVENT_OVERHEAD_BYTES + payload_bytes
