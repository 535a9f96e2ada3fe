"""One frame on its way into the store, and what one peer has been asked for: chunks, credit, deadlines, resume.

Credit is counted in bytes: at most a window's worth is asked of a peer and not yet received, so that nothing queues up
anywhere. A cut loses only what was under way; whatever arrived is never asked for again.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass, field

from p2pcodistill.checkpoint.manifest import SignedManifest, Version, digest_chunk
from p2pcodistill.errors import ChecksumError, MalformedError
from p2pcodistill.gossip.messages import Chunk

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

    @property
    def version(self) -> Version:
        """The version that the frame leads to."""
        return self.signed.version

    @property
    def base(self) -> Version | None:
        """The version that it needs; None: a keyframe."""
        return self.signed.base

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
    leads_further: bool = False
    """Whether, once it is stored, the chain of its origin leads to a higher version than before."""
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
        if digest_chunk(chunk.data) != manifest.chunk_digests[chunk.index]:
            raise ChecksumError(f"chunk {chunk.index} does not match its hash")
        self._held.add(chunk.index)
        return True
