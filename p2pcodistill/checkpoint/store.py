"""A site's frames on disk: content-addressed, atomic, crash-safe, bounded.

    site.json                        the site's incarnation, and the schema hash pinned for each origin
    manifests/<frame_id>.manifest    msgpack [body, signature] of every frame below
    frames/<frame_id>.frame          a complete frame: renamed in whole, and from then on only ever unlinked
    frames/<frame_id>.part           a frame being fetched: chunks at their offsets, holes between them
    *.tmp                            any of these being written; worthless after a crash

A frame counts as complete from the rename of its file on, and its manifest is durable before that. So a crash
between any two writes leaves the last complete chain readable, and at most files that belong to nothing;
opening the store removes those. Chunks are written without fsync: what a partial frame really holds after a
crash is found out by hashing it.

Of every teacher the store keeps the shortest chain that leads to the newest version it can reach (see `chain`). A
*local keyframe* is a teacher's reference that this site's own ranks encoded anew, so that a long chain need not be
kept: its manifest names the teacher as origin, but bears this site's signature, and it is never announced or served.

Readers elsewhere may map a `.frame` file; pruning it does not disturb them. This module is part of the byte
plane and imports neither torch nor numpy.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgpack

from p2pcodistill.checkpoint.chain import reachable, shortest_chain
from p2pcodistill.checkpoint.manifest import (
    DIGEST_BYTES,
    MAX_FRAME_BYTES,
    MAX_MANIFEST_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunk,
    digest_chunks,
    verify_manifest,
)
from p2pcodistill.errors import (
    ChecksumError,
    MalformedError,
    OversizedError,
    RefusedError,
    RunFolderError,
    SignatureError,
    UnknownPeerError,
)
from p2pcodistill.identity import SIGNATURE_BYTES, PublicIdentity

DEFAULT_MAX_STORE_BYTES = MAX_FRAME_BYTES
_MAX_MANIFEST_FILE_BYTES = MAX_MANIFEST_BYTES + SIGNATURE_BYTES + 16
_SITE_FORMAT_VERSION = 1
_STAMP_AGE_NS = 10**9


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """A complete frame: what was signed, and the file that holds its bytes. A local keyframe `is_local`."""

    signed: SignedManifest
    path: Path
    is_local: bool = False

    @property
    def version(self) -> Version:
        """The manifest's version."""
        return self.signed.version

    @property
    def base(self) -> Version | None:
        """The manifest's base."""
        return self.signed.base

    @property
    def num_bytes(self) -> int:
        """The frame's size."""
        return self.signed.num_bytes


@dataclass(slots=True)
class _Partial:
    signed: SignedManifest
    descriptor: int
    present: set[int]


class FrameStore:
    """The store in one folder, for one process.

    Every method blocks on the disk. Threads may share a store; one call runs at a time. A full disk surfaces
    as OSError from the method that met it, a frame for which the store's own cap leaves no room as OversizedError;
    both leave the store as it was before the call.
    """

    def __init__(
        self,
        folder: Path,
        *,
        site: str,
        keys: Mapping[str, PublicIdentity],
        max_bytes: int = DEFAULT_MAX_STORE_BYTES,
    ) -> None:
        """Open the store in `folder` (made if missing): verify every frame by hash, remove what a crash left.

        `keys` names the members whose frames are kept, `site` among them; `max_bytes` bounds complete plus
        partial frames.
        Raises RunFolderError when `site.json` is damaged, OSError when the folder cannot be used.
        """
        self._folder = folder
        self._site = site
        self._frames_folder = folder / "frames"
        self._manifests_folder = folder / "manifests"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._complete: dict[str, StoredFrame] = {}
        self._partials: dict[str, _Partial] = {}
        # By frame that was hashed in this life: when its file was changed last, as this store has stamped it.
        self._stamps_ns: dict[str, int] = {}
        self._leftovers: dict[
            str, SignedManifest
        ] = {}  # partial frames of an earlier life, not begun in this one
        for needed in (folder, self._frames_folder, self._manifests_folder):
            needed.mkdir(parents=True, exist_ok=True)
        self._incarnation, self._pinned_schemas = self._read_site()
        self._heal(keys)

    # --- the site ----------------------------------------------------------------------------------------------------

    @property
    def incarnation(self) -> int:
        """The incarnation saved last; 0 when none was yet."""
        return self._incarnation

    def save_incarnation(self, incarnation: int) -> None:
        """Make `incarnation` durable. Raises ValueError if it is below the saved one, OSError."""
        with self._lock:
            if incarnation < self._incarnation:
                raise ValueError(f"incarnation {incarnation} is below the saved {self._incarnation}")
            self._write_site(incarnation, self._pinned_schemas)
            self._incarnation = incarnation

    def pinned_schema(self, origin: str) -> bytes | None:
        """The schema hash pinned last for `origin`'s frames; None before the first was."""
        return self._pinned_schemas.get(origin)

    def pin_schema(self, origin: str, schema_hash: bytes) -> None:
        """Make the pin durable; it replaces any other of `origin`. Raises OSError.

        When that may happen is the caller's to say (see `gossip.announce`).
        """
        with self._lock:
            if self._pinned_schemas.get(origin) == schema_hash:
                return
            pins = self._pinned_schemas | {origin: schema_hash}
            self._write_site(self._incarnation, pins)
            self._pinned_schemas = pins

    # --- writing frames ----------------------------------------------------------------------------------------------

    def adopt(self, signed: SignedManifest, source: Path) -> StoredFrame:
        """Move a frame in that this site's ranks encoded, its own or a local keyframe: rename it, or copy it from
        another file system.

        Raises ChecksumError when the file's size is not the manifest's, OversizedError when there is no room
        for it under the store's cap, OSError. `source` is gone afterwards, and may be gone after an OSError.
        """
        with self._lock:
            frame_id = signed.frame_id
            if frame_id in self._complete:
                source.unlink()
                return self._complete[frame_id]
            num_bytes = source.stat().st_size
            if num_bytes != signed.manifest.num_bytes:
                raise ChecksumError(
                    f"{source} holds {num_bytes} bytes, its manifest says {signed.manifest.num_bytes}"
                )
            self._check_room(num_bytes)
            staged = self._frames_folder / f"{frame_id}.tmp"
            try:
                _move(source, staged)
                _sync(staged)
                self._write_manifest(frame_id, signed)
                is_local = signed.manifest.origin != self._site
                return self._admit(frame_id, signed, staged, is_local=is_local)
            except OSError:
                staged.unlink(missing_ok=True)
                if frame_id not in self._complete:
                    self._unlink(frame_id)
                raise

    def begin(self, signed: SignedManifest) -> frozenset[int]:
        """Open a partial frame, or continue one, and return the indices of the chunks that it holds.

        A frame that is complete holds them all. What an earlier life left is verified chunk by chunk.
        Obligation: `signed` was verified. Raises OversizedError when there is no room for the frame under the
        store's cap, OSError.
        """
        with self._lock:
            frame_id = signed.frame_id
            if frame_id in self._complete:
                return frozenset(range(signed.manifest.num_chunks))
            if frame_id not in self._partials:
                self._partials[frame_id] = self._open_partial(frame_id, signed)
                self._leftovers.pop(frame_id, None)
            return frozenset(self._partials[frame_id].present)

    def put_chunk(self, frame_id: str, index: int, data: bytes) -> None:
        """Write one chunk of a frame that was begun.

        Obligation: the caller verified the hash of `data`. Raises KeyError when it was not begun, IndexError
        or ValueError when the manifest has no such chunk or another length for it, OSError.
        """
        with self._lock:
            partial = self._partials[frame_id]
            offset, length = partial.signed.manifest.chunk_range(index)
            if len(data) != length:
                raise ValueError(f"chunk {index} of frame {frame_id} has {length} bytes, got {len(data)}")
            view = memoryview(data)
            while view:  # a disk that fills up takes a part, and fails on the next call
                num_written = os.pwrite(partial.descriptor, view, offset)
                view = view[num_written:]
                offset += num_written
            partial.present.add(index)

    def complete(self, frame_id: str) -> StoredFrame:
        """Turn a partial frame that holds every chunk into a complete one, durably.

        Raises KeyError when the frame was not begun, ValueError when chunks are missing, OSError.
        """
        with self._lock:
            if frame_id in self._complete:
                return self._complete[frame_id]
            partial = self._partials[frame_id]
            num_missing = partial.signed.manifest.num_chunks - len(partial.present)
            if num_missing:
                raise ValueError(f"frame {frame_id} lacks {num_missing} chunks")
            os.fsync(partial.descriptor)
            return self._admit(frame_id, partial.signed, self._part_path(frame_id))

    def abandon(self, frame_id: str) -> None:
        """Drop a partial frame with what it holds. Does nothing to a complete or an unknown one."""
        with self._lock:
            self._close_partial(frame_id)
            self._leftovers.pop(frame_id, None)
            if frame_id not in self._complete:
                self._unlink(frame_id)

    # --- reading frames ----------------------------------------------------------------------------------------------

    def read_chunk(self, frame_id: str, index: int) -> bytes | None:
        """One chunk, verified by hash, of a complete frame or of one that was begun; None when it is not there.

        Of a frame that came in this life, and was hashed then, it is read as it is while nobody has written to the file:
        whoever receives it checks it again. A frame that turns out to be damaged is dropped, and counts as gone.
        """
        with self._lock:
            stored = self._complete.get(frame_id)
            if stored is None and frame_id in self._partials:
                return self._read_partial(self._partials[frame_id], index)
            if stored is None or not 0 <= index < stored.signed.manifest.num_chunks:
                return None
            offset, length = stored.signed.manifest.chunk_range(index)
            is_untouched = False
            try:
                with stored.path.open("rb", buffering=0) as file:
                    data = os.pread(file.fileno(), length, offset)
                    is_untouched = os.fstat(file.fileno()).st_mtime_ns == self._stamps_ns.get(frame_id)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EIO):
                    raise
                data = b""
            if is_untouched and len(data) == length:
                return data
            if digest_chunk(data) != stored.signed.manifest.chunk_digests[index]:
                self._unlink(frame_id)
                del self._complete[frame_id]
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
        """Remove what is superseded, and return the ids of the complete frames that are gone. Frames in `keep_frame_ids` and
        frames being fetched stay, and besides them

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
            gone = tuple(frame_id for frame_id in self._complete if frame_id not in kept)
            for frame_id in gone:
                self._unlink(frame_id)
                del self._complete[frame_id]
            for frame_id, signed in list(self._leftovers.items()):
                origin = signed.manifest.origin
                held = reachable(self._frames(origin))
                is_passed = origin in relayed_origins or (held is not None and held >= signed.version)
                if is_passed and frame_id not in keep_frame_ids:
                    self._unlink(frame_id)
                    del self._leftovers[frame_id]
            return gone

    def drop(self, origin: str) -> None:
        """Forget all complete frames of `origin`: its chain turned out to be broken."""
        with self._lock:
            # Keyframes first: after a crash between any two of these nothing that is left looks like a chain.
            for stored in sorted(self._frames(origin), key=lambda stored: stored.base is not None):
                self._unlink(stored.signed.frame_id)
                del self._complete[stored.signed.frame_id]

    def close(self) -> None:
        """Close the partial frames' files; what they hold stays for the next life. May be called twice."""
        with self._lock:
            for frame_id in list(self._partials):
                self._close_partial(frame_id)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _frame_path(self, frame_id: str) -> Path:
        return self._frames_folder / f"{frame_id}.frame"

    def _part_path(self, frame_id: str) -> Path:
        return self._frames_folder / f"{frame_id}.part"

    def _manifest_path(self, frame_id: str) -> Path:
        return self._manifests_folder / f"{frame_id}.manifest"

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

    def _check_room(self, num_bytes: int) -> None:
        held = [stored.signed for stored in self._complete.values()]
        held += [partial.signed for partial in self._partials.values()]
        held += self._leftovers.values()
        num_held_bytes = sum(signed.manifest.num_bytes for signed in held)
        num_excess_bytes = num_held_bytes + num_bytes - self._max_bytes
        if num_excess_bytes > 0:
            raise OversizedError(
                f"a frame of {num_bytes} bytes is {num_excess_bytes} bytes too many for the store, whose cap is "
                f"{self._max_bytes} and which holds {num_held_bytes}"
            )

    def _open_partial(self, frame_id: str, signed: SignedManifest) -> _Partial:
        manifest = signed.manifest
        is_new = frame_id not in self._leftovers
        if is_new:
            self._check_room(manifest.num_bytes)
        descriptor = os.open(self._part_path(frame_id), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, manifest.num_bytes)
            if is_new:
                self._write_manifest(frame_id, signed)
                return _Partial(signed, descriptor, set())
            return _Partial(signed, descriptor, _find_chunks(descriptor, manifest))
        except BaseException:
            os.close(descriptor)
            if is_new:
                self._unlink(frame_id)
            raise

    def _close_partial(self, frame_id: str) -> None:
        partial = self._partials.pop(frame_id, None)
        if partial is not None:
            os.close(partial.descriptor)

    def _read_partial(self, partial: _Partial, index: int) -> bytes | None:
        if index not in partial.present:
            return None
        offset, length = partial.signed.manifest.chunk_range(index)
        data = os.pread(partial.descriptor, length, offset)
        return data if digest_chunk(data) == partial.signed.manifest.chunk_digests[index] else None

    def _admit(
        self, frame_id: str, signed: SignedManifest, staged: Path, *, is_local: bool = False
    ) -> StoredFrame:
        stored = StoredFrame(signed, self._frame_path(frame_id), is_local)
        # Before now, or a write within the same tick of the file system's clock would not show.
        stamp_ns = staged.stat().st_mtime_ns - _STAMP_AGE_NS
        os.utime(staged, ns=(stamp_ns, stamp_ns))
        staged.replace(stored.path)
        self._stamps_ns[frame_id] = stored.path.stat().st_mtime_ns
        self._complete[frame_id] = stored
        self._close_partial(frame_id)
        self._leftovers.pop(frame_id, None)
        _sync(self._frames_folder)
        return stored

    def _unlink(self, frame_id: str) -> None:
        self._stamps_ns.pop(frame_id, None)
        for path in (self._frame_path(frame_id), self._part_path(frame_id), self._manifest_path(frame_id)):
            path.unlink(missing_ok=True)

    def _write_manifest(self, frame_id: str, signed: SignedManifest) -> None:
        _write_durably(self._manifest_path(frame_id), msgpack.packb((signed.body, signed.signature)))

    def _write_site(self, incarnation: int, pins: Mapping[str, bytes]) -> None:
        record = {
            "format_version": _SITE_FORMAT_VERSION,
            "incarnation": incarnation,
            "pinned_schemas": {origin: schema_hash.hex() for origin, schema_hash in sorted(pins.items())},
        }
        _write_durably(self._folder / "site.json", (json.dumps(record, indent=2) + "\n").encode())

    def _read_site(self) -> tuple[int, dict[str, bytes]]:
        path = self._folder / "site.json"
        try:
            record = json.loads(path.read_bytes())
            incarnation = record["incarnation"]
            pins = {origin: bytes.fromhex(text) for origin, text in record["pinned_schemas"].items()}
            if (
                record["format_version"] != _SITE_FORMAT_VERSION
                or type(incarnation) is not int
                or incarnation < 0
                or any(len(pin) != DIGEST_BYTES for pin in pins.values())
            ):
                raise ValueError("its values are not what this version writes")
        except FileNotFoundError:
            return 0, {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunFolderError(
                f"{path} is damaged or was written by another version ({type(error).__name__}: {error}): "
                "remove it to come back as a new incarnation, with no schema pinned"
            ) from None
        return incarnation, pins

    def _heal(self, keys: Mapping[str, PublicIdentity]) -> None:
        """Index what is whole, and remove every file that belongs to nothing."""
        for path in sorted(self._manifests_folder.iterdir()):
            frame_id = path.stem
            try:
                signed, is_local = _read_manifest(path, keys, self._site)
            except RefusedError:
                continue
            if path != self._manifest_path(signed.frame_id):
                continue
            if self._frame_path(frame_id).exists():
                if digest_chunks(self._frame_path(frame_id), signed.manifest.chunk_bytes) == (
                    signed.manifest.chunk_digests
                ):
                    self._complete[frame_id] = StoredFrame(signed, self._frame_path(frame_id), is_local)
            elif self._part_path(frame_id).exists():
                self._leftovers[frame_id] = signed
        known = {self._frame_path(frame_id) for frame_id in self._complete}
        known |= {self._part_path(frame_id) for frame_id in self._leftovers}
        known |= {self._manifest_path(frame_id) for frame_id in (*self._complete, *self._leftovers)}
        unfinished = self._folder.glob("*.tmp")
        for path in (*unfinished, *self._frames_folder.iterdir(), *self._manifests_folder.iterdir()):
            if path not in known:
                path.unlink()


def _read_manifest(path: Path, keys: Mapping[str, PublicIdentity], site: str) -> tuple[SignedManifest, bool]:
    """The manifest in `path`, verified under its origin's key, or as that of a local keyframe, which the second value says.

    Raises a RefusedError, or OSError.
    """
    with path.open("rb") as file:
        raw = file.read(_MAX_MANIFEST_FILE_BYTES + 1)
    if len(raw) > _MAX_MANIFEST_FILE_BYTES:
        raise OversizedError(f"{path} is larger than a manifest can be")
    try:
        body, signature = msgpack.unpackb(raw, use_list=False, max_array_len=2, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException):
        raise MalformedError(f"{path} is not a stored manifest") from None
    if type(body) is not bytes or type(signature) is not bytes:
        raise MalformedError(f"{path} is not a stored manifest")
    claimed = Manifest.from_bytes(body)  # names the key to verify with; nothing else is used unverified
    if claimed.origin not in keys:
        raise UnknownPeerError(f"{path} belongs to {claimed.origin!r}, which is not a member")
    try:
        return verify_manifest(body, signature, keys[claimed.origin]), False
    except SignatureError:
        if claimed.base is not None:
            raise
        return verify_manifest(body, signature, keys[site]), True


def _find_chunks(descriptor: int, manifest: Manifest) -> set[int]:
    """The indices of the chunks that a partial file really holds."""
    present = set()
    for index, digest in enumerate(manifest.chunk_digests):
        offset, length = manifest.chunk_range(index)
        if digest_chunk(os.pread(descriptor, length, offset)) == digest:
            present.add(index)
    return present


def _move(source: Path, target: Path) -> None:
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(source, target)
        source.unlink()


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, all or nothing, durably."""
    staged = path.with_name(path.name + ".tmp")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
    _sync(path.parent)
