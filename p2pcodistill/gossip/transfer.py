"""Fetching frames: what is missing, what was asked of whom, credit, deadlines, resume.

One frame per origin is fetched at a time, pulled chunk by chunk from the peers that are known to hold it. Credit is
counted in bytes: at most a window's worth is asked of a peer and not yet received, so that nothing queues up anywhere.
A cut loses only what was under way; whatever arrived is never asked for again.

A newer version replaces a download only while nothing of it has arrived or is under way. Otherwise the download is
finished first and the newest version is fetched next, skipping those between: even over a slow link every download
that has begun to arrive is completed.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection
from dataclasses import dataclass, field

from p2pcodistill import telemetry
from p2pcodistill.checkpoint.manifest import SignedManifest
from p2pcodistill.errors import ChecksumError, MalformedError
from p2pcodistill.gossip.events import (
    AbandonFrame,
    Action,
    BeginFetch,
    CompleteFrame,
    Report,
    SendPayload,
    StoreChunk,
    send,
)
from p2pcodistill.gossip.messages import MAX_WANT_INDICES, Chunk, Want

MAX_BAD_CHUNKS = 3
"""After so many wrong chunks of a frame, its peer is not asked for that frame any more."""
MAX_PATIENCE_FACTOR = 32
"""Each stall in a row doubles the time until the next is declared, up to this many stall timeouts."""


class Window:
    """What was asked of one peer in this session and has not arrived."""

    def __init__(self, *, window_bytes: int, stall_timeout_s: float) -> None:
        self.patience_s = stall_timeout_s
        """How long the peer may stay silent. It follows what the link shows: asking a slow one again too early would
        only add to its queue."""
        self._stall_timeout_s = stall_timeout_s
        self._window_bytes = window_bytes
        self._asked_bytes: dict[tuple[str, int], int] = {}
        self._num_asked_bytes = 0
        self._progress_s: float | None = None
        self._deadline_from_s = 0.0

    @property
    def credit_bytes(self) -> int:
        """How much more may be asked for."""
        return self._window_bytes - self._num_asked_bytes

    @property
    def is_low(self) -> bool:
        """Whether it is time to ask for more: at least half the window is free, so that wants are few and large."""
        return 2 * self._num_asked_bytes <= self._window_bytes

    def has_asked(self, frame_id: str) -> bool:
        """Whether anything of this frame is under way from the peer."""
        return any(asked == frame_id for asked, _ in self._asked_bytes)

    def ask(self, frame_id: str, index: int, num_bytes: int, now_s: float) -> None:
        """Spend credit on a chunk. There must be enough of it."""
        assert num_bytes <= self.credit_bytes
        if self._progress_s is None:
            self._progress_s = self._deadline_from_s = now_s
        self._asked_bytes[frame_id, index] = num_bytes
        self._num_asked_bytes += num_bytes

    def receive(self, frame_id: str, index: int, now_s: float) -> bool:
        """A chunk arrived: its credit is back, and the deadline moves. False when it was not asked for."""
        if self._progress_s is not None:
            self.patience_s = max(self._stall_timeout_s, 2 * (now_s - self._progress_s))
            self._progress_s = self._deadline_from_s = now_s
        num_bytes = self._asked_bytes.pop((frame_id, index), None)
        self._num_asked_bytes -= num_bytes or 0
        return num_bytes is not None

    def is_stalled(self, now_s: float) -> bool:
        """Whether something is under way and nothing has arrived for too long."""
        return bool(self._asked_bytes) and now_s - self._deadline_from_s >= self.patience_s

    def stall(self, now_s: float) -> None:
        """Give what is under way up for lost (see `void`), and be more patient next time."""
        longest_s = MAX_PATIENCE_FACTOR * self._stall_timeout_s
        self.patience_s = max(self.patience_s, min(2 * self.patience_s, longest_s))
        self._deadline_from_s = now_s

    def void(self, frame_id: str | None = None) -> list[tuple[str, int]]:
        """Forget what is under way, of one frame or of all; credit returns. The (frame, index) pairs, as asked."""
        voided = [key for key in self._asked_bytes if frame_id in (None, key[0])]
        for key in voided:
            self._num_asked_bytes -= self._asked_bytes.pop(key)
        return voided

    def rest(self) -> None:
        """Nothing more is to be asked for now; with nothing under way there is no deadline."""
        if not self._asked_bytes:
            self._progress_s = None


@dataclass(slots=True)
class Offer:
    """A frame that may be fetched: `num_bad_chunks_of` maps the peers known to hold it to their wrong chunks so far."""

    signed: SignedManifest
    frame_id: str
    num_bad_chunks_of: dict[str, int]

    def is_usable(self, peer: str) -> bool:
        """Whether `peer` may be asked for this frame."""
        return self.num_bad_chunks_of.get(peer, MAX_BAD_CHUNKS) < MAX_BAD_CHUNKS

    @property
    def has_source(self) -> bool:
        """Whether anyone may be asked, here now or not."""
        return any(map(self.is_usable, self.num_bad_chunks_of))


@dataclass(slots=True)
class Download:
    """One frame on its way into the store."""

    offer: Offer
    started_s: float
    is_begun: bool = False
    is_completing: bool = False
    num_resent_bytes: int = 0
    _held: set[int] = field(default_factory=set)
    _wanted: list[int] = field(default_factory=list)  # a heap; may still name chunks that have arrived since

    @property
    def frame_id(self) -> str:
        """The frame's name."""
        return self.offer.frame_id

    @property
    def num_held(self) -> int:
        """How many chunks are there."""
        return len(self._held)

    @property
    def is_full(self) -> bool:
        """Whether all chunks are there."""
        return self.is_begun and len(self._held) == self.offer.signed.manifest.num_chunks

    def begin(self, present: Collection[int]) -> None:
        """The store is ready and holds the chunks `present` already."""
        self.is_begun = True
        self._held.update(present)
        # Ascending, thus a heap.
        self._wanted = [i for i in range(self.offer.signed.manifest.num_chunks) if i not in self._held]

    def next_wanted(self) -> tuple[int, int] | None:
        """The lowest chunk that is neither there nor under way, as (index, bytes)."""
        while self._wanted and self._wanted[0] in self._held:
            heapq.heappop(self._wanted)
        if not self._wanted:
            return None
        return self._wanted[0], self.offer.signed.manifest.chunk_range(self._wanted[0])[1]

    def take_wanted(self) -> None:
        """The chunk that `next_wanted` names is under way."""
        heapq.heappop(self._wanted)

    def want_again(self, index: int) -> None:
        """A chunk that was under way will not come, or came wrong."""
        heapq.heappush(self._wanted, index)

    def accept(self, chunk: Chunk) -> bool:
        """Count a chunk as there. False when it was already. Raises MalformedError or ChecksumError."""
        manifest = self.offer.signed.manifest
        if chunk.index >= manifest.num_chunks:
            raise MalformedError(f"chunk {chunk.index} of a frame with {manifest.num_chunks}")
        if chunk.index in self._held:
            self.num_resent_bytes += len(chunk.data)
            return False
        num_bytes = manifest.chunk_range(chunk.index)[1]
        if len(chunk.data) != num_bytes:
            raise MalformedError(f"chunk {chunk.index} has {len(chunk.data)} bytes instead of {num_bytes}")
        if hashlib.sha256(chunk.data).digest() != manifest.chunk_digests[chunk.index]:
            raise ChecksumError(f"chunk {chunk.index} does not match its hash")
        self._held.add(chunk.index)
        return True


class Transfers:
    """All downloads of one site, and its credit with every ready peer.

    After every change, `next_actions` says what follows from it.
    """

    def __init__(self, *, window_bytes: int, stall_timeout_s: float) -> None:
        self._window_bytes = window_bytes
        self._stall_timeout_s = stall_timeout_s
        self._windows: dict[str, Window] = {}
        self._offers: dict[str, Offer] = {}  # by origin: the newest version announced, until it is stored
        self._downloads: dict[str, Download] = {}  # by origin

    @property
    def fetching(self) -> tuple[str, ...]:
        """The frames being fetched."""
        return tuple(download.frame_id for download in self._downloads.values())

    @property
    def credit_bytes(self) -> dict[str, int]:
        """What may still be asked of each ready peer."""
        return {peer: window.credit_bytes for peer, window in self._windows.items()}

    def open(self, peer: str) -> None:
        """`peer` became ready."""
        self._windows[peer] = Window(window_bytes=self._window_bytes, stall_timeout_s=self._stall_timeout_s)

    def close(self, peer: str) -> None:
        """`peer` is not ready any more: what was under way from it is void."""
        window = self._windows.pop(peer, None)
        if window is not None:
            self._want_again(window.void())

    def offer(self, peer: str, signed: SignedManifest) -> None:
        """`peer` holds a frame that is newer than all known of its origin."""
        self._offers[signed.manifest.origin] = Offer(signed, signed.frame_id, {peer: 0})

    def add_source(self, peer: str, signed: SignedManifest) -> None:
        """`peer` holds the newest frame known of its origin, too; or still, in a new session."""
        offer = self._offers.get(signed.manifest.origin)
        if offer is not None:  # else it is stored already
            offer.num_bad_chunks_of.setdefault(peer, 0)

    def begin(self, frame_id: str, present: Collection[int]) -> None:
        """The store is ready for a frame and holds the chunks `present` of it."""
        download = self._find(frame_id)
        if download is not None and not download.is_begun:
            download.begin(present)

    def receive(self, peer: str, chunk: Chunk, now_s: float) -> list[Action]:
        """A ready peer sent a chunk."""
        was_asked = self._windows[peer].receive(chunk.frame_id, chunk.index, now_s)
        download = self._find(chunk.frame_id)
        if download is None or not download.is_begun:
            return []  # the late answer to a request that is void
        try:
            is_new = download.accept(chunk)
        except (MalformedError, ChecksumError) as error:
            if was_asked:
                download.want_again(chunk.index)
            self._count_bad_chunk(peer, download.offer)
            return [Report(telemetry.Refused(peer, error.reason, f"{peer} sent a wrong chunk: {error}"))]
        return [StoreChunk(chunk.frame_id, chunk.index, chunk.data)] if is_new else []

    def lose_source(self, peer: str, frame_id: str) -> None:
        """`peer` does not hold this frame any more."""
        for offer in (*self._offers.values(), *(download.offer for download in self._downloads.values())):
            if offer.frame_id == frame_id:
                offer.num_bad_chunks_of.pop(peer, None)
        self._want_again(self._windows[peer].void(frame_id))

    def store(self, frame_id: str) -> Download | None:
        """A frame is complete in the store; its download, which is over, or None if it was given up before."""
        download = self._find(frame_id)
        if download is None or not download.is_completing:
            return None
        origin = download.offer.signed.manifest.origin
        del self._downloads[origin]
        if self._offers[origin] is download.offer:
            del self._offers[origin]
        return download

    def give_up(self, frame_id: str) -> Download | None:
        """The store does not take a frame: its download, which is over. It is not tried again in these sessions."""
        download = self._find(frame_id)
        if download is not None:
            del self._downloads[download.offer.signed.manifest.origin]
            download.offer.num_bad_chunks_of.clear()
            for window in self._windows.values():
                window.void(frame_id)
        return download

    def tick(self, now_s: float) -> None:
        """Time has passed: requests of silent peers are void."""
        for window in self._windows.values():
            if window.is_stalled(now_s):
                window.stall(now_s)
                self._want_again(window.void())

    def next_actions(self, now_s: float) -> list[Action]:
        """What to give up, begin, complete and ask for now."""
        actions: list[Action] = []
        for origin, offer in self._offers.items():
            download = self._downloads.get(origin)
            if download is not None and self._is_hopeless(download, offer):
                del self._downloads[origin]
                actions.append(AbandonFrame(download.frame_id))
                download = None
            if download is None and offer.has_source:
                self._downloads[origin] = Download(offer, now_s)
                actions.append(BeginFetch(offer.signed))
            elif download is not None and download.is_full and not download.is_completing:
                download.is_completing = True
                actions.append(CompleteFrame(download.frame_id))
        return actions + self._wants(now_s)

    def _is_hopeless(self, download: Download, newest: Offer) -> bool:
        # Either way nothing of it is under way: who ceases to be a source is asked for nothing any more.
        if download.is_full or not download.is_begun:
            return False
        if not download.offer.has_source:
            return True
        is_overtaken = newest is not download.offer and newest.has_source
        return is_overtaken and download.num_held == 0 and not self._is_under_way(download.frame_id)

    def _wants(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        # The liveliest peers first, so that what one of them let stall is asked of another where there is one.
        for peer, window in sorted(self._windows.items(), key=lambda item: item[1].patience_s):
            if window.is_low:
                for download in self._downloads.values():
                    if download.is_begun and download.offer.is_usable(peer):
                        indices = _ask(window, download, now_s)
                        actions += _want_actions(peer, download.frame_id, indices)
            window.rest()
        return actions

    def _find(self, frame_id: str) -> Download | None:
        return next((d for d in self._downloads.values() if d.frame_id == frame_id), None)

    def _count_bad_chunk(self, peer: str, offer: Offer) -> None:
        if peer not in offer.num_bad_chunks_of:
            return  # nobody asked it
        offer.num_bad_chunks_of[peer] += 1
        if not offer.is_usable(peer):
            self._want_again(self._windows[peer].void(offer.frame_id))

    def _is_under_way(self, frame_id: str) -> bool:
        return any(window.has_asked(frame_id) for window in self._windows.values())

    def _want_again(self, voided: list[tuple[str, int]]) -> None:
        for frame_id, index in voided:
            download = self._find(frame_id)
            if download is not None:
                download.want_again(index)


def _ask(window: Window, download: Download, now_s: float) -> list[int]:
    indices = []
    while (wanted := download.next_wanted()) is not None and wanted[1] <= window.credit_bytes:
        download.take_wanted()
        window.ask(download.frame_id, *wanted, now_s)
        indices.append(wanted[0])
    return indices


def _want_actions(peer: str, frame_id: str, indices: list[int]) -> list[SendPayload]:
    wants = [
        Want(frame_id, tuple(indices[start : start + MAX_WANT_INDICES]))
        for start in range(0, len(indices), MAX_WANT_INDICES)
    ]
    return [send(peer, want) for want in wants]
