"""One frame on its way into the store: chunks, who holds them, resume.

Sets of chunks are bitmaps (bit i: chunk i), so that "what is missing here and held there" is one operation, even of a frame
of tens of thousands of chunks. A cut loses only what was under way; whatever arrived is never asked for again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from p2pcodistill.checkpoint.manifest import SignedManifest, Version, digest_chunk
from p2pcodistill.errors import ChecksumError, MalformedError
from p2pcodistill.gossip.messages import Chunk

MAX_BAD_CHUNKS = 3
"""After so many wrong chunks of a frame, its peer is not asked for that frame any more."""


@dataclass(slots=True)
class Source:
    """What a peer can be asked of a frame: the chunks `held`, None for all of them."""

    held: int | None = None
    num_bad_chunks: int = 0
    is_stale: bool = False
    """Whether it fetched a part once, and has told of nothing more for long: nobody waits for it."""

    @property
    def is_usable(self) -> bool:
        """Whether it may be asked."""
        return self.num_bad_chunks < MAX_BAD_CHUNKS


@dataclass(slots=True)
class Offer:
    """A frame that may be fetched, and the peers that are known to hold it, or a part of it."""

    signed: SignedManifest
    sources: dict[str, Source]
    lost: list[str] = field(default_factory=list)
    """Those who said that they do not hold it any more."""
    frame_id: str = field(init=False)
    """The frame's name."""
    version: Version = field(init=False)
    """The version that the frame leads to."""
    base: Version | None = field(init=False)
    """The version that it needs; None: a keyframe."""

    def __post_init__(self) -> None:
        manifest = self.signed.manifest
        self.frame_id, self.version, self.base = self.signed.frame_id, manifest.version, manifest.base

    def add(self, peer: str, *, has_all: bool = True) -> None:
        """`peer` holds the frame, or will say by and by what it holds of it."""
        source = self.sources.setdefault(peer, Source(held=None if has_all else 0))
        source.is_stale = False
        if has_all:
            source.held = None
        if peer in self.lost:
            self.lost.remove(peer)

    def lose(self, peer: str) -> None:
        """`peer` does not hold the frame any more."""
        if self.sources.pop(peer, None) is not None:
            self.lost.append(peer)

    @property
    def has_source(self) -> bool:
        """Whether anyone may be asked, here now or not."""
        return any(source.is_usable for source in self.sources.values())

    def has_source_among(self, peers: Collection[str]) -> bool:
        """Whether one of `peers` may be asked."""
        return any(
            peer in peers and source.is_usable and not source.is_stale
            for peer, source in self.sources.items()
        )


@dataclass(slots=True)
class Download:
    """One frame on its way into the store. Its chunks are asked for in order, from `first_index` on, and around."""

    offer: Offer
    started_s: float
    first_index: int = 0
    is_begun: bool = False
    is_completing: bool = False
    num_resent_bytes: int = 0
    num_of_origin: int = 0
    """How many chunks the origin itself has sent."""
    leads_further: bool = False
    """Whether, once it is stored, the chain of its origin leads to a higher version than before."""
    hungry_s: float | None = None
    """Since when nothing of it is under way, as far as ticks tell."""
    held: int = 0
    """The chunks that are there."""
    wanted: int = 0
    """The chunks that are neither there nor under way."""
    asked_of: dict[int, str] = field(default_factory=dict)
    """The chunks that are under way, each from one peer."""
    frame_id: str = field(init=False)
    """The frame's name."""
    origin: str = field(init=False)
    """Whose frame it is."""
    num_chunks: int = field(init=False)
    """How many chunks the frame has."""
    all_chunks: int = field(init=False)
    """The chunks of the whole frame."""

    def __post_init__(self) -> None:
        manifest = self.offer.signed.manifest
        self.frame_id, self.origin, self.num_chunks = (
            self.offer.frame_id,
            manifest.origin,
            manifest.num_chunks,
        )
        self.all_chunks = (1 << self.num_chunks) - 1

    @property
    def is_full(self) -> bool:
        """Whether all chunks are there."""
        return self.is_begun and self.held == self.all_chunks

    @property
    def is_arriving(self) -> bool:
        """Whether any of it has arrived or is under way."""
        return bool(self.held or self.asked_of)

    def begin(self, present: Collection[int]) -> None:
        """The store is ready and holds the chunks `present` already."""
        self.is_begun = True
        for index in present:
            self.held |= 1 << index
        self.wanted = self.all_chunks & ~self.held

    def next_of(self, chunks: int) -> int:
        """The chunk of `chunks`, which are not none, that comes first in this download's order."""
        onward = chunks >> self.first_index
        return self.first_index + _lowest(onward) if onward else _lowest(chunks)

    def last_of(self, chunks: int) -> int:
        """The chunk of `chunks`, which are not none, that comes last in this download's order."""
        before = chunks & ((1 << self.first_index) - 1)
        return (before or chunks).bit_length() - 1

    def ask(self, index: int, peer: str) -> None:
        """A wanted chunk is under way from `peer`."""
        self.asked_of[index] = peer
        self.wanted &= ~(1 << index)

    def want_again(self, index: int, peer: str) -> None:
        """A chunk that was asked of `peer` will not come, or came wrong."""
        if self.asked_of.get(index) == peer:
            del self.asked_of[index]
            self.wanted |= (1 << index) & ~self.held

    def accept(self, chunk: Chunk) -> bool:
        """Count a chunk as there. False when it was already. Raises MalformedError or ChecksumError."""
        manifest = self.offer.signed.manifest
        if chunk.index >= manifest.num_chunks:
            raise MalformedError(f"chunk {chunk.index} of a frame with {manifest.num_chunks}")
        if self.held >> chunk.index & 1:
            self.num_resent_bytes += len(chunk.data)
            return False
        num_bytes = manifest.chunk_range(chunk.index)[1]
        if len(chunk.data) != num_bytes:
            raise MalformedError(f"chunk {chunk.index} has {len(chunk.data)} bytes instead of {num_bytes}")
        if digest_chunk(chunk.data) != manifest.chunk_digests[chunk.index]:
            raise ChecksumError(f"chunk {chunk.index} does not match its hash")
        self.held |= 1 << chunk.index
        self.wanted &= ~(1 << chunk.index)
        self.asked_of.pop(chunk.index, None)
        return True


def _lowest(chunks: int) -> int:
    return (chunks & -chunks).bit_length() - 1
