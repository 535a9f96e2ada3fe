"""Serving chunks: read from the store and handed to the transport one by one, as caps, fairness and the peers allow.

A want only queues requests, which cost next to nothing; a chunk is read when it is its turn and there is room for it. So
what waits in memory is bounded whatever peers ask for, one that does not read holds up nobody, and control, which does not
come this way, never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.errors import OversizedError
from p2pcodistill.gossip.codec import encode_message
from p2pcodistill.gossip.messages import Chunk, Gone, lane_of
from p2pcodistill.transport.base import Transport
from p2pcodistill.transport.refusals import RefusalLog
from p2pcodistill.transport.shaper import Shaper, UploadCaps

MAX_REQUESTS = 4096
"""Of one peer: a whole window of the smallest chunks, twice."""
RETRY_S = 0.02
"""When to look again whether the transport has room for a peer."""
MAX_BURST_BYTES = 1 << 20
"""What is served in one go; others want their turn."""
CHARGE_INTERVAL_S = 1.0
"""How long control may pile up before a cap sees it, while nobody is served."""

_Request: TypeAlias = tuple[str, int]


class Uploads:
    """What peers have asked for and not been given. `lose` is called with the id of a frame that is not in the store.

    Bytes of all kinds count towards `caps`, but only chunks wait for them.
    """

    def __init__(
        self,
        store: FrameStore,
        transport: Transport,
        refusals: RefusalLog,
        lose: Callable[[str], Awaitable[None]],
        caps: UploadCaps,
    ) -> None:
        self._store, self._transport, self._refusals, self._lose = store, transport, refusals, lose
        self._shaper: Shaper[_Request] = Shaper(caps, max_requests=MAX_REQUESTS)
        self._asked = asyncio.Event()
        self._blocked_until_s: dict[str, float] = {}
        self._num_bytes_charged: dict[str, int] = {}
        # By session: all bytes of chunk messages that were sent, and how many with and before each chunk.
        self._num_bytes_sent: dict[str, int] = {}
        self._last_chunk_bytes: dict[str, int] = {}
        self._sent: dict[str, dict[_Request, int]] = {}

    def serve(self, peer: str, frame_id: str, index: int) -> None:
        """Queue a chunk for `peer`, unless it waits, or is on its way, already: an impatient peer does not get it twice."""
        request = (frame_id, index)
        if self._is_under_way(peer, request):
            return
        if not self._shaper.add(peer, request):
            why = f"{peer} wants more than {MAX_REQUESTS} chunks at once"
            self._refusals.note(peer, OversizedError.reason, why, time.monotonic())
        self._asked.set()

    def forget(self, peer: str) -> None:
        """The session with `peer` is over."""
        self._shaper.drop(peer)
        for table in (self._blocked_until_s, self._num_bytes_sent, self._sent):
            table.pop(peer, None)

    def num_waiting_bytes(self, peer: str) -> int:
        """About how much waits for its turn, by the size of the chunk that `peer` got last."""
        return self._shaper.num_waiting(peer) * self._last_chunk_bytes.get(peer, 0)

    async def run(self) -> None:
        """Serve, for ever. Raises OSError when this site's own store cannot be read."""
        num_burst_bytes = 0
        while True:
            now_s = time.monotonic()
            self._charge(now_s)
            self._blocked_until_s = {p: s for p, s in self._blocked_until_s.items() if s > now_s}
            found = self._shaper.next(now_s, blocked=self._blocked_until_s)
            if found is None:
                await self._wait(now_s)
                continue
            num_bytes = await self._serve(*found, now_s)
            num_burst_bytes += num_bytes
            if not num_bytes or num_burst_bytes >= MAX_BURST_BYTES:
                num_burst_bytes = 0
                await asyncio.sleep(0)  # there may be many

    async def _serve(self, peer: str, request: _Request, now_s: float) -> int:
        """Serve one request, if there is room for it; how many bytes were sent."""
        frame_id, index = request
        # Who asks again may have found it damaged, as a disk does it that nobody has written to.
        was_sent = request in self._sent.get(peer, ())
        data = self._store.read_chunk(frame_id, index, verify=was_sent)
        if data is None:
            gone = Gone(frame_id)
            self._transport.send(peer, lane_of(gone), encode_message(gone))
            self._shaper.finish(peer, request)
            await self._lose(frame_id)
            return 0
        chunk = Chunk(frame_id, index, data)
        payload = encode_message(chunk)
        if not self._transport.send(peer, lane_of(chunk), payload):
            self._blocked_until_s[peer] = now_s + RETRY_S
            return 0
        self._shaper.finish(peer, request)
        num_bytes = sum(map(len, payload))
        self._num_bytes_sent[peer] = self._num_bytes_sent.get(peer, 0) + num_bytes
        self._last_chunk_bytes[peer] = len(data)
        sent = self._sent.setdefault(peer, {})
        sent.pop(request, None)
        sent[request] = self._num_bytes_sent[peer]
        if len(sent) > MAX_REQUESTS:
            del sent[next(iter(sent))]
        if not self._shaper.is_capped:
            self._shaper.spend(peer, num_bytes, now_s)
        return num_bytes

    async def _wait(self, now_s: float) -> None:
        """Until somebody asks, a cap lets something through, or it is time to try a peer again."""
        waits_s = [until_s - now_s for until_s in self._blocked_until_s.values()]
        wait_s = self._shaper.wait_s(now_s, blocked=self._blocked_until_s)
        waits_s += [] if wait_s is None else [wait_s]
        waits_s += [CHARGE_INTERVAL_S] if self._shaper.is_capped else []
        self._asked.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(waits_s) if waits_s else None):
                await self._asked.wait()

    def _charge(self, now_s: float) -> None:
        """Count towards the caps whatever was sent since the last time, control included."""
        if not self._shaper.is_capped:
            return
        for peer, traffic in self._transport.traffic().items():
            num_new_bytes = traffic.num_bytes_sent - self._num_bytes_charged.get(peer, 0)
            if num_new_bytes:
                self._num_bytes_charged[peer] = traffic.num_bytes_sent
                self._shaper.spend(peer, num_new_bytes, now_s)

    def _is_under_way(self, peer: str, request: _Request) -> bool:
        num_sent_bytes = self._sent.get(peer, {}).get(request)
        if num_sent_bytes is None:
            return False
        num_received_bytes = self._num_bytes_sent[peer] - self._transport.traffic()[peer].num_bytes_under_way
        return num_sent_bytes > num_received_bytes
