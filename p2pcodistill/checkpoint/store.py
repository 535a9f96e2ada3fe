"""A site's frames on disk: content-addressed, atomic, crash-safe, bounded.

    site.json     the site's incarnation, and the schema hash pinned for each origin (see `site_record`)
    manifests/    the signed description of every frame
    frames/       complete frames, and those being fetched (see `frame_files`)

A frame counts as complete from the rename of its file on, and its manifest is durable before that. So a crash
between any two writes leaves the last complete chain readable, and at most files that belong to nothing;
opening the store removes those.

Of every teacher the store keeps the shortest chain that leads to the newest version it can reach (see `chain`). A
*local keyframe* is a teacher's reference that this site's own ranks encoded anew, so that a long chain need not be
kept: its manifest names the teacher as origin, but bears this site's signature, and it is never announced or served.

Readers elsewhere may map a `.frame` file; pruning it does not disturb them. This module is part of the byte
plane and imports neither torch nor numpy.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from p2pcodistill.checkpoint.chain import reachable, shortest_chain
from p2pcodistill.checkpoint.durable import move, sync
from p2pcodistill.checkpoint.frame_files import FrameFiles, StoredFrame
from p2pcodistill.checkpoint.manifest import MAX_FRAME_BYTES, SignedManifest, digest_chunk
from p2pcodistill.checkpoint.partial import PartialFrame
from p2pcodistill.checkpoint.site_record import SiteRecord
from p2pcodistill.errors import ChecksumError, OversizedError
from p2pcodistill.identity import PublicIdentity

__all__ = ["DEFAULT_MAX_STORE_BYTES", "FrameStore", "StoredFrame"]

DEFAULT_MAX_STORE_BYTES = MAX_FRAME_BYTES


class FrameStore:
    """The store in one folder, for one process.

    Every method blocks on the disk. Threads may share a store. What makes frames durable (`adopt`, `begin`, `complete`)
    runs one at a time, and holds up no other call but `abandon` and `close`. A full disk surfaces
    as OSError from the method that met it, a frame for which the store's own cap leaves no room as OversizedError;
    both leave the store as it was before the call, but for what `begin` has removed to make room.
    """

    def __init__(
        self,
        folder: Path,
        *,
        site: str,
        keys: Mapping[str, PublicIdentity],
        max_bytes: int = DEFAULT_MAX_STORE_BYTES,
    ) -> None:
        """Open the store in `folder` (made if missing): remove what a crash left, and what somebody has damaged.

        `keys` names the members whose frames are kept, `site` among them; `max_bytes` bounds complete plus
        partial frames.
        Raises RunFolderError when `site.json` is damaged, OSError when the folder cannot be used.
        """
        self._site = site
        self._max_bytes = max_bytes
        self._durable_lock = threading.Lock()  # taken before the other
        self._lock = threading.Lock()
        self._files = FrameFiles(folder)
        self._record = SiteRecord(folder / "site.json")
        self._partials: dict[str, PartialFrame] = {}
        # Leftovers are partial frames of an earlier life, not begun in this one.
        self._complete, self._leftovers = self._files.heal(keys, site)
        self._evicted: dict[str, None] = {}  # since the last `prune`

    # --- the site ----------------------------------------------------------------------------------------------------

    @property
    def incarnation(self) -> int:
        """The incarnation saved last; 0 when none was yet."""
        return self._record.incarnation

    def save_incarnation(self, incarnation: int) -> None:
        """Make `incarnation` durable. Raises ValueError if it is below the saved one, OSError."""
        with self._lock:
            self._record.save_incarnation(incarnation)

    def pinned_schema(self, origin: str) -> bytes | None:
        """The schema hash pinned last for `origin`'s frames; None before the first was."""
        return self._record.pinned_schema(origin)

    def pin_schema(self, origin: str, schema_hash: bytes) -> None:
        """Make the pin durable; it replaces any other of `origin`. Raises OSError.

        When that may happen is the caller's to say (see `gossip.announce`).
        """
        with self._lock:
            self._record.pin_schema(origin, schema_hash)

    # --- writing frames ----------------------------------------------------------------------------------------------

    def adopt(self, signed: SignedManifest, source: Path, *, may_evict: bool = True) -> StoredFrame:
        """Move a frame in that this site's ranks encoded, its own or a local keyframe: rename it, or copy it from
        another file system. For a keyframe what it supersedes goes if there is no room for both, unless not `may_evict`.

        Raises ChecksumError when the file's size is not the manifest's, OversizedError when there is no room
        for it under the store's cap, OSError. `source` is gone afterwards, and may be gone after an OSError. What is
        superseded goes only when the new frame is durable.
        """
        frame_id = signed.frame_id
        with self._durable_lock:
            with self._lock:
                if frame_id in self._complete:
                    source.unlink()
                    return self._complete[frame_id]
                num_bytes = source.stat().st_size
                if num_bytes != signed.num_bytes:
                    raise ChecksumError(
                        f"{source} holds {num_bytes} bytes, its manifest says {signed.num_bytes}"
                    )
                superseded = self._find_room(signed, may_evict=may_evict)
            staged = self._files.staged_path(frame_id)
            try:
                move(source, staged)
                self._files.write_manifest(signed)
                self._files.sync_manifest(frame_id)
                sync(staged)
                with self._lock:
                    stored = self._admit(signed, staged, is_local=signed.manifest.origin != self._site)
                self._files.sync_frames()
            except OSError:
                staged.unlink(missing_ok=True)
                if frame_id not in self._complete:
                    self._files.unlink(frame_id)
                raise
            with self._lock:
                self._evict(superseded)
            return stored

    def begin(self, signed: SignedManifest) -> frozenset[int]:
        """Open a partial frame, or continue one, and return the indices of the chunks that it holds.

        A frame that is complete holds them all. What an earlier life left is verified chunk by chunk. For a keyframe what it
        supersedes goes, the oldest first, if there is no room for both: better none until it is here than none from now on.
        It stays gone if an OSError follows.
        Obligation: `signed` was verified. Raises OversizedError when there is no room for the frame under the
        store's cap, OSError.
        """
        frame_id = signed.frame_id
        with self._durable_lock:
            with self._lock:
                if frame_id in self._complete:
                    return frozenset(range(signed.manifest.num_chunks))
                partial = self._partials.get(frame_id)
                if partial is not None:
                    return frozenset(partial.present)
                if frame_id not in self._leftovers:
                    self._evict(self._find_room(signed))
            partial = self._open_partial(signed)
            with self._lock:
                self._partials[frame_id] = partial
                self._leftovers.pop(frame_id, None)
                return frozenset(partial.present)

    def put_chunk(self, frame_id: str, index: int, data: bytes) -> None:
        """Write one chunk of a frame that was begun.

        Obligation: the caller verified the hash of `data`. Raises KeyError when it was not begun, IndexError
        or ValueError when the manifest has no such chunk or another length for it, OSError.
        """
        with self._lock:
            self._partials[frame_id].put_chunk(index, data)

    def flush(self, frame_id: str) -> None:
        """Make durable what is there of a partial frame by now, so that less is left to do for `complete`.

        Holds up no other call. What goes wrong here `complete` will meet again, and raise.
        """
        with suppress(OSError):  # by a descriptor of its own: an error is told to each only once
            sync(self._files.part_path(frame_id))

    def complete(self, frame_id: str) -> StoredFrame:
        """Turn a partial frame that holds every chunk into a complete one, durably.

        Raises KeyError when the frame was not begun, ValueError when chunks are missing, OSError.
        """
        with self._durable_lock:
            with self._lock:
                if frame_id in self._complete:
                    return self._complete[frame_id]
                partial = self._partials[frame_id]
                if partial.num_missing:
                    raise ValueError(f"frame {frame_id} lacks {partial.num_missing} chunks")
            self._files.sync_manifest(frame_id)
            partial.sync()
            with self._lock:
                stored = self._admit(partial.signed, self._files.part_path(frame_id))
            self._files.sync_frames()
            return stored

    def abandon(self, frame_id: str) -> None:
        """Drop a partial frame with what it holds. Does nothing to a complete or an unknown one."""
        with self._durable_lock, self._lock:
            self._close_partial(frame_id)
            self._leftovers.pop(frame_id, None)
            if frame_id not in self._complete:
                self._files.unlink(frame_id)

    # --- reading frames ----------------------------------------------------------------------------------------------

    def read_chunk(self, frame_id: str, index: int, *, verify: bool = False) -> bytes | None:
        """One chunk, verified by hash, of a complete frame or of one that was begun; None when it is not there.

        Of a frame that came in this life, and was hashed then, it is read as it is while nobody has written to the file,
        unless `verify`: whoever receives it checks it again. A frame that turns out to be damaged is dropped, and counts as
        gone.
        """
        with self._lock:
            stored = self._complete.get(frame_id)
            if stored is None:
                partial = self._partials.get(frame_id)
                return None if partial is None else partial.read_chunk(index)
            manifest = stored.signed.manifest
            if not 0 <= index < manifest.num_chunks:
                return None
            data, is_untouched = self._files.read(stored, *manifest.chunk_range(index))
            if (verify or not is_untouched) and digest_chunk(data) != manifest.chunk_digests[index]:
                self._remove(frame_id)
                return None
            return data

    def frames(self, origin: str) -> tuple[StoredFrame, ...]:
        """The complete frames of `origin` by version, local keyframes included; of one version the delta frame first."""
        with self._lock:
            return tuple(self._frames(origin))

    def chain(self, origin: str) -> tuple[StoredFrame, ...]:
        """The fewest frames that lead from nothing to the highest version of `origin` that can be reached; oldest first, ()
        when no keyframe is there.
        """
        with self._lock:
            return tuple(self._chain(origin))

    def prune(
        self, *, keep_frame_ids: Collection[str], relayed_origins: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Remove what is superseded, and return the ids of the complete frames that are gone since the last call, whether by
        this one or because a keyframe needed the room. Frames in `keep_frame_ids` and frames being fetched stay, and besides
        them

        - of another member: its `chain`, and what is newer than that and may become part of it; but nothing of
          `relayed_origins`, which are held only for others,
        - of this site: what is at least as new as its newest frame in `keep_frame_ids`, because it was adopted just now,
        - partial frames of an earlier life that are newer than their origin's chain.
        """
        with self._lock:
            origins = {stored.signed.manifest.origin for stored in self._complete.values()}
            kept = {
                frame_id
                for origin in sorted(origins)
                if origin not in relayed_origins
                for frame_id in self._needed(origin, keep_frame_ids)
            }.union(keep_frame_ids)
            superseded = [frame_id for frame_id in self._complete if frame_id not in kept]
            gone = (*self._evicted, *superseded)
            self._evicted.clear()
            for frame_id in superseded:
                self._remove(frame_id)
            for frame_id, signed in list(self._leftovers.items()):
                origin = signed.manifest.origin
                held = reachable(self._frames(origin))
                is_passed = origin in relayed_origins or (held is not None and held >= signed.version)
                if is_passed and frame_id not in keep_frame_ids:
                    self._files.unlink(frame_id)
                    del self._leftovers[frame_id]
            return gone

    def drop(self, origin: str) -> None:
        """Forget all complete frames of `origin`: its chain turned out to be broken."""
        with self._lock:
            # Keyframes first: after a crash between any two of these nothing that is left looks like a chain.
            for stored in sorted(self._frames(origin), key=lambda stored: stored.base is not None):
                self._remove(stored.signed.frame_id)

    def close(self) -> None:
        """Close the partial frames' files; what they hold stays for the next life. May be called twice."""
        with self._durable_lock, self._lock:
            for frame_id in list(self._partials):
                self._close_partial(frame_id)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _frames(self, origin: str) -> list[StoredFrame]:
        frames = [stored for stored in self._complete.values() if stored.signed.manifest.origin == origin]
        return sorted(
            frames, key=lambda stored: (stored.version, stored.base is None, stored.signed.frame_id)
        )

    def _chain(self, origin: str) -> list[StoredFrame]:
        return shortest_chain(self._frames(origin))

    def _needed(self, origin: str, keep_frame_ids: Collection[str]) -> set[str]:
        """The frames of `origin` that `prune` keeps."""
        frames = self._frames(origin)
        kept = [stored for stored in frames if stored.signed.frame_id in keep_frame_ids]
        if origin == self._site:
            newest = kept[-1].version if kept else None
            kept += [stored for stored in frames if newest is None or stored.version >= newest]
        else:
            chain = self._chain(origin)
            kept += [
                *chain,
                *(stored for stored in frames if not chain or stored.version > chain[-1].version),
            ]
        return {stored.signed.frame_id for stored in kept}

    def _find_room(self, signed: SignedManifest, *, may_evict: bool = True) -> list[str]:
        """The ids of the frames that must go for this one. Raises OversizedError when that would not be enough."""
        held = [stored.signed for stored in self._complete.values()]
        held += [partial.signed for partial in self._partials.values()]
        held += self._leftovers.values()
        num_held_bytes = sum(one.num_bytes for one in held)
        num_excess_bytes = num_held_bytes + signed.num_bytes - self._max_bytes
        if num_excess_bytes <= 0:
            return []
        old = [stored.signed for stored in self._frames(signed.manifest.origin)]
        old = [one for one in old if one.version <= signed.version]
        if not may_evict or signed.base is not None or sum(one.num_bytes for one in old) < num_excess_bytes:
            raise OversizedError(
                f"a frame of {signed.num_bytes} bytes is {num_excess_bytes} bytes too many for the store, whose cap is "
                f"{self._max_bytes} and which holds {num_held_bytes}"
            )
        superseded: list[str] = []
        while num_excess_bytes > 0:
            oldest = old.pop(0)
            superseded.append(oldest.frame_id)
            num_excess_bytes -= oldest.num_bytes
        return superseded

    def _evict(self, frame_ids: Sequence[str]) -> None:
        for frame_id in frame_ids:
            if frame_id in self._complete:  # else it was removed meanwhile
                self._remove(frame_id)
                self._evicted[frame_id] = None

    def _open_partial(self, signed: SignedManifest) -> PartialFrame:
        frame_id = signed.frame_id
        is_new = frame_id not in self._leftovers
        partial = None
        try:
            partial = PartialFrame(self._files.part_path(frame_id), signed)
            if is_new:
                self._files.write_manifest(signed)
            else:
                partial.find_chunks()
            return partial
        except BaseException:
            if partial is not None:
                partial.close()
            if is_new:
                self._files.unlink(frame_id)
            raise

    def _close_partial(self, frame_id: str) -> None:
        partial = self._partials.pop(frame_id, None)
        if partial is not None:
            partial.close()

    def _admit(self, signed: SignedManifest, staged: Path, *, is_local: bool = False) -> StoredFrame:
        frame_id = signed.frame_id
        stored = self._complete[frame_id] = self._files.admit(signed, staged, is_local=is_local)
        self._close_partial(frame_id)
        self._leftovers.pop(frame_id, None)
        self._evicted.pop(frame_id, None)
        return stored

    def _remove(self, frame_id: str) -> None:
        self._files.unlink(frame_id)
        del self._complete[frame_id]
