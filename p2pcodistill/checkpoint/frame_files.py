"""The files of a store's frames: their names, the manifests beside them, and what a crash leaves of them.

    manifests/<frame_id>.manifest    msgpack [body, signature] of every frame below
    frames/<frame_id>.frame          a complete frame: renamed in whole, and from then on only ever unlinked
    frames/<frame_id>.part           a frame being fetched, see `partial`
    *.tmp                            any of these being written; worthless after a crash

A complete frame is *stamped*: its file and its manifest's bear the same time of last change, set back by a second. Whoever
writes to either undoes that. So a file that was verified once need not be hashed again for as long as nobody touches it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgpack

from p2pcodistill.checkpoint.durable import sync, write_whole
from p2pcodistill.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunks,
    verify_manifest,
)
from p2pcodistill.errors import (
    MalformedError,
    OversizedError,
    RefusedError,
    SignatureError,
    UnknownPeerError,
)
from p2pcodistill.identity import SIGNATURE_BYTES, PublicIdentity

_MAX_MANIFEST_FILE_BYTES = MAX_MANIFEST_BYTES + SIGNATURE_BYTES + 16
_STAMP_AGE_NS = 10**9
"""A write within the same tick of the file system's clock would not show otherwise."""


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


class FrameFiles:
    """The files in the folder of one store; all methods raise OSError."""

    def __init__(self, folder: Path) -> None:
        """Make the folders that are missing."""
        self._folder = folder
        self._frames_folder = folder / "frames"
        self._manifests_folder = folder / "manifests"
        for needed in (folder, self._frames_folder, self._manifests_folder):
            needed.mkdir(parents=True, exist_ok=True)
        self._stamps_ns: dict[str, int] = {}  # of frames that were hashed in this life

    def frame_path(self, frame_id: str) -> Path:
        """The file of a complete frame."""
        return self._frames_folder / f"{frame_id}.frame"

    def part_path(self, frame_id: str) -> Path:
        """The file of a partial frame."""
        return self._frames_folder / f"{frame_id}.part"

    def staged_path(self, frame_id: str) -> Path:
        """Where to put a whole frame before `admit`."""
        return self._frames_folder / f"{frame_id}.tmp"

    # --- writing -----------------------------------------------------------------------------------------------------

    def write_manifest(self, signed: SignedManifest) -> None:
        """Put a frame's manifest beside it, all or nothing. `sync_manifest` makes it durable."""
        write_whole(self._manifest_path(signed.frame_id), msgpack.packb((signed.body, signed.signature)))

    def sync_manifest(self, frame_id: str) -> None:
        """Make a frame's manifest durable."""
        sync(self._manifest_path(frame_id))
        sync(self._manifests_folder)

    def admit(self, signed: SignedManifest, staged: Path, *, is_local: bool = False) -> StoredFrame:
        """Let a durable file, which was verified, become that of a complete frame; `sync_frames` makes that durable.

        Obligation: the frame's manifest is durable.
        """
        stored = StoredFrame(signed, self.frame_path(signed.frame_id), is_local)
        stamp_ns = staged.stat().st_mtime_ns - _STAMP_AGE_NS
        for path in (staged, self._manifest_path(signed.frame_id)):
            os.utime(path, ns=(stamp_ns, stamp_ns))
        staged.replace(stored.path)
        self._stamps_ns[signed.frame_id] = stored.path.stat().st_mtime_ns
        return stored

    def sync_frames(self) -> None:
        """Make durable which frames are complete."""
        sync(self._frames_folder)

    def unlink(self, frame_id: str) -> None:
        """Remove whatever there is of a frame."""
        self._stamps_ns.pop(frame_id, None)
        for path in (self.frame_path(frame_id), self.part_path(frame_id), self._manifest_path(frame_id)):
            path.unlink(missing_ok=True)

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, stored: StoredFrame, offset: int, num_bytes: int) -> tuple[bytes, bool]:
        """Bytes of a complete frame, fewer where the file is cut or gone; and whether they are as this life has hashed them,
        because nobody has touched the file since."""
        try:
            descriptor = os.open(stored.path, os.O_RDONLY)
            try:
                data = os.pread(descriptor, num_bytes, offset)
                changed_ns = os.fstat(descriptor).st_mtime_ns
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EIO):
                raise
            return b"", False
        is_untouched = changed_ns == self._stamps_ns.get(stored.signed.frame_id)
        return data, is_untouched and len(data) == num_bytes

    def heal(
        self, keys: Mapping[str, PublicIdentity], site: str
    ) -> tuple[dict[str, StoredFrame], dict[str, SignedManifest]]:
        """The complete frames and the partial ones, by id. Every file that belongs to nothing is removed."""
        complete: dict[str, StoredFrame] = {}
        partial: dict[str, SignedManifest] = {}
        for path in sorted(self._manifests_folder.iterdir()):
            frame_id = path.stem
            try:
                signed, is_local = _read_manifest(path, keys, site)
            except RefusedError:
                continue
            if path != self._manifest_path(signed.frame_id):
                continue
            if self.frame_path(frame_id).exists():
                stored = StoredFrame(signed, self.frame_path(frame_id), is_local)
                if self._is_whole(stored):
                    complete[frame_id] = stored
            elif self.part_path(frame_id).exists():
                partial[frame_id] = signed
        known = {self.frame_path(frame_id) for frame_id in complete}
        known |= {self.part_path(frame_id) for frame_id in partial}
        known |= {self._manifest_path(frame_id) for frame_id in (*complete, *partial)}
        unfinished = self._folder.glob("*.tmp")
        for path in (*unfinished, *self._frames_folder.iterdir(), *self._manifests_folder.iterdir()):
            if path not in known:
                path.unlink()
        return complete, partial

    def _is_whole(self, stored: StoredFrame) -> bool:
        """Whether the file of a frame from an earlier life is stamped, or passes for whole by hash."""
        manifest, status = stored.signed.manifest, stored.path.stat()
        if status.st_size != manifest.num_bytes:
            return False
        if status.st_mtime_ns == self._manifest_path(stored.signed.frame_id).stat().st_mtime_ns:
            return True
        return digest_chunks(stored.path, manifest.chunk_bytes) == manifest.chunk_digests

    def _manifest_path(self, frame_id: str) -> Path:
        return self._manifests_folder / f"{frame_id}.manifest"


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
