"""A frame store in memory, for sites in virtual time: what `checkpoint.store.FrameStore` owes, without its disk.

Chunks are kept as they came: many sites that hold one frame hold the same bytes. It survives a restart of its site; partial
frames do, too, with the chunks that they hold.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES, reachable, shortest_chain
from p2pcodistill.checkpoint.manifest import SignedManifest, Version


@dataclass(frozen=True, slots=True, eq=False)
class MemoryFrame:
    """A complete frame; a `chain.ChainFrame`. A local keyframe `is_local`."""

    signed: SignedManifest
    chunks: tuple[bytes, ...] = field(repr=False)
    is_local: bool = False

    @property
    def frame_id(self) -> str:
        """The frame's name."""
        return self.signed.frame_id

    @property
    def version(self) -> Version:
        """The version that it leads to."""
        return self.signed.version

    @property
    def base(self) -> Version | None:
        """The version that it needs; None: a keyframe."""
        return self.signed.base

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.signed.num_bytes


@dataclass(slots=True)
class _Partial:
    signed: SignedManifest
    chunks: dict[int, bytes]
    is_open: bool = True


class MemoryStore:
    """What one site keeps, of itself and of its teachers. Times and obligations are those of `FrameStore`."""

    def __init__(self, site: str) -> None:
        self.incarnation = 0
        self.pinned_schemas: dict[str, bytes] = {}
        self._site = site
        self._complete: dict[str, MemoryFrame] = {}
        self._of_origin: dict[str, dict[str, MemoryFrame]] = {}
        self._chains: dict[str, tuple[MemoryFrame, ...]] = {}
        self._newest: dict[str, Version] = {}  # that was ever here
        self._grown: dict[str, None] = {}  # origins of what has come since the last pruning
        self._is_loose = False  # whether any of that did more than make a teacher's chain longer
        self._left: dict[str, None] = {}  # origins of what the last pruning left that will be superseded
        self._partials: dict[str, _Partial] = {}

    def adopt(self, signed: SignedManifest, chunks: tuple[bytes, ...]) -> MemoryFrame:
        """Take a frame in that this site's ranks encoded, its own or a local keyframe."""
        is_local = signed.manifest.origin != self._site
        return self._admit(MemoryFrame(signed, chunks, is_local))

    def begin(self, signed: SignedManifest, frame_id: str) -> frozenset[int]:
        """Open a partial frame, or continue one; the indices of the chunks that are there."""
        if frame_id in self._complete:
            return frozenset(range(signed.manifest.num_chunks))
        partial = self._partials.setdefault(frame_id, _Partial(signed, {}))
        partial.is_open = True
        return frozenset(partial.chunks)

    def put_chunk(self, frame_id: str, index: int, data: bytes) -> None:
        """Keep a chunk, whose hash was verified, of a frame that was begun."""
        self._partials[frame_id].chunks[index] = data

    def complete(self, frame_id: str) -> MemoryFrame:
        """Turn a partial frame that holds every chunk into a complete one."""
        if frame_id in self._complete:
            return self._complete[frame_id]
        partial = self._partials.pop(frame_id)
        num_chunks = partial.signed.manifest.num_chunks
        chunks = (
            (partial.chunks[0],) if num_chunks == 1 else tuple(partial.chunks[i] for i in range(num_chunks))
        )
        return self._admit(MemoryFrame(partial.signed, chunks))

    def abandon(self, frame_id: str) -> None:
        """Drop a partial frame."""
        self._partials.pop(frame_id, None)

    def read_chunk(self, frame_id: str, index: int) -> bytes | None:
        """One chunk of a complete frame or of one that was begun; None when it is not there."""
        stored = self._complete.get(frame_id)
        if stored is not None:
            return stored.chunks[index] if 0 <= index < len(stored.chunks) else None
        partial = self._partials.get(frame_id)
        return partial.chunks.get(index) if partial is not None and partial.is_open else None

    @property
    def is_prunable(self) -> bool:
        """Whether anything has come since the last `prune` that may supersede something."""
        return self._is_loose or any(not partial.is_open for partial in self._partials.values())

    @property
    def origins(self) -> tuple[str, ...]:
        """Those of whom complete frames are, or were, here."""
        return tuple(self._of_origin)

    def frames(self, origin: str) -> list[MemoryFrame]:
        """The complete frames of `origin` by version, of one version the delta frame first."""
        frames = self._of_origin.get(origin, {}).values()
        return sorted(frames, key=lambda frame: (frame.version, frame.base is None, frame.frame_id))

    def chain(self, origin: str) -> tuple[MemoryFrame, ...]:
        """The fewest frames that lead from nothing to the highest version of `origin` that can be reached, oldest first."""
        chain = self._chains.get(origin)
        if chain is None:
            chain = self._chains[origin] = tuple(shortest_chain(self.frames(origin)))
        return chain

    def prune(
        self, keep_frame_ids: Collection[str], *, relayed_origins: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Remove what is superseded, as `FrameStore.prune` does, and return the ids of the complete frames that are gone."""
        gone: list[str] = []
        for origin in dict.fromkeys([*self._grown, *self._left, *relayed_origins]):
            if origin not in self._of_origin:
                continue
            is_relayed = origin in relayed_origins
            if not is_relayed and self._is_all_needed(origin, keep_frame_ids):
                continue
            frames = self.frames(origin)
            kept = [frame for frame in frames if frame.frame_id in keep_frame_ids]
            if is_relayed:
                pass
            elif origin == self._site:
                newest = kept[-1].version if kept else None
                kept += [frame for frame in frames if newest is None or frame.version >= newest]
            else:
                chain = self.chain(origin)
                kept += chain
                kept += [frame for frame in frames if not chain or frame.version > chain[-1].version]
            needed = {frame.frame_id for frame in kept}
            for frame in frames:
                if frame.frame_id not in needed:
                    self._remove(frame)
                    gone.append(frame.frame_id)
        for frame_id, partial in list(self._partials.items()):
            if partial.is_open or frame_id in keep_frame_ids:
                continue
            origin = partial.signed.manifest.origin
            held = reachable(self.frames(origin))
            if origin in relayed_origins or (held is not None and held >= partial.signed.version):
                del self._partials[frame_id]
        # What is kept for somebody who is fetching it is looked at again when anything new has come.
        self._left = {
            origin: None
            for origin in {**self._grown, **self._left}
            if len(self._of_origin[origin]) > (1 if origin == self._site else len(self.chain(origin)))
        }
        self._grown, self._is_loose = {}, False
        return tuple(gone)

    def drop(self, origin: str) -> None:
        """Forget all complete frames of `origin`."""
        for frame in self.frames(origin):
            self._remove(frame)

    def restart(self) -> None:
        """The site comes up again: what was being fetched is left over from an earlier life."""
        for partial in self._partials.values():
            partial.is_open = False
        self._grown, self._is_loose = dict.fromkeys(self._of_origin), True

    # --- inside ------------------------------------------------------------------------------------------------------

    def _admit(self, frame: MemoryFrame) -> MemoryFrame:
        frame_id, origin = frame.signed.frame_id, frame.signed.manifest.origin
        if frame_id in self._complete:
            return self._complete[frame_id]
        others = self._of_origin.setdefault(origin, {})
        chain = self.chain(origin)
        newest = self._newest.get(origin)
        self._complete[frame_id] = others[frame_id] = frame
        self._grown[origin] = None
        self._partials.pop(frame_id, None)
        version, base = frame.signed.version, frame.signed.base
        is_newest = newest is None or version > newest
        if is_newest:
            self._newest[origin] = version
        # The newest of all can lead nowhere else: that spares looking at the rest.
        if is_newest and chain and base == chain[-1].signed.version and len(chain) < MAX_CHAIN_FRAMES:
            self._chains[origin] = (*chain, frame)
            self._is_loose |= origin == self._site
            return frame
        self._is_loose |= len(others) > 1
        if is_newest and base is None:
            self._chains[origin] = (frame,)
        else:
            self._chains.pop(origin, None)
        return frame

    def _is_all_needed(self, origin: str, keep_frame_ids: Collection[str]) -> bool:
        """Whether it is plain that nothing of `origin` is superseded."""
        frames = self._of_origin[origin]
        if origin == self._site:
            return all(frame_id in keep_frame_ids for frame_id in frames)
        return len(frames) == len(self.chain(origin))

    def _remove(self, frame: MemoryFrame) -> None:
        origin = frame.signed.manifest.origin
        del self._complete[frame.frame_id]
        del self._of_origin[origin][frame.frame_id]
        if frame in self._chains.get(origin, ()):
            del self._chains[origin]
