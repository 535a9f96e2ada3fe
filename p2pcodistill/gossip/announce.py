"""What is announced of teachers: which versions are known of each, and what that means for an announcement.

The origin of a frame announces it, and so does whoever has fetched it from there: what counts is the origin's signature,
under the key of the member list, never who passes it on. An announcement that is known already is not verified again.

An origin announces a version once, when it is published, and again in a new session; whatever is older is refused, while a
peer that passes frames on may simply be behind. Only the answer to a request to catch up, a path, may go back to older
frames, on its way to the newest. Two frames of one version may be the
same checkpoint: a delta frame, and the keyframe of the reference that it yields.

An origin's schema (names, shapes and dtypes of its tensors) is pinned, and stays as it is within one incarnation. A later
incarnation may bring another one, which replaces the pin: somebody mended a configuration and launched the workers anew.
Whether a schema fits this site's student is not known here; the ranks decide that when they decode the frame, and refuse
one that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from p2pcodistill.checkpoint.manifest import SignedManifest, Version, claimed_origin, verify_manifest
from p2pcodistill.errors import (
    MalformedError,
    OversizedError,
    RefusedError,
    ReplayedError,
    SchemaMismatchError,
    SignatureError,
    UnknownPeerError,
)
from p2pcodistill.gossip.messages import Announce, CatchUp
from p2pcodistill.gossip.plan import MAX_PLAN_MANIFEST_BYTES
from p2pcodistill.identity import PublicIdentity

Verify: TypeAlias = Callable[[bytes, bytes, PublicIdentity], SignedManifest]


@dataclass(frozen=True, slots=True)
class Accepted:
    """Verified announcements: one frame, or all of a path, oldest first.

    `is_new`: the last frame's version was not known; `pins_schema`: its schema is not the pinned one.
    """

    frames: tuple[SignedManifest, ...]
    is_new: bool
    pins_schema: bool


@dataclass(slots=True)
class _Path:
    """As much of a path as has arrived. When a part of it was refused, the rest is passed over in silence."""

    frames: list[SignedManifest] = field(default_factory=list)
    num_manifest_bytes: int = 0
    num_more: int = 0
    is_refused: bool = False


class Announcements:
    """The newest version known of each teacher, and the paths that are being announced."""

    def __init__(
        self,
        *,
        run: str,
        teachers: Mapping[str, PublicIdentity],
        held: Mapping[str, Version],
        pinned_schemas: Mapping[str, bytes],
        max_chunk_bytes: int,
        max_frame_bytes: int,
        verify: Verify = verify_manifest,
    ) -> None:
        """`held` maps teachers to the version that the store's chain of each leads to."""
        self._run = run
        self._verify_manifest = verify
        self._teachers = dict(teachers)
        self._newest = {origin: held[origin] for origin in self._teachers if origin in held}
        self._announced: dict[
            str, SignedManifest
        ] = {}  # the first frame of the newest version, since the start
        self._schemas = dict(pinned_schemas)
        self._paths: dict[tuple[str, str], _Path] = {}  # by peer and origin
        self._max_chunk_bytes = max_chunk_bytes
        self._max_frame_bytes = max_frame_bytes

    def known_incarnation(self, origin: str) -> int:
        """The highest incarnation under which `origin` is known to have published, 0 for none."""
        newest = self._newest.get(origin)
        return newest.incarnation if newest else 0

    def newest(self, origin: str) -> SignedManifest | None:
        """The first frame of the newest version of `origin` that was announced since the start."""
        return self._announced.get(origin)

    def newest_version(self, origin: str) -> Version | None:
        """The newest version known of `origin`."""
        return self._newest.get(origin)

    def add(self, origin: str, public: PublicIdentity) -> None:
        """Frames of `origin` are accepted from now on."""
        self._teachers[origin] = public

    def remove(self, origin: str, *, forgetting: bool = True) -> None:
        """Frames of `origin` are not accepted any more; what is known of it is forgotten, unless it may come back."""
        self._teachers.pop(origin, None)
        if forgetting:
            self._newest.pop(origin, None)
            self._announced.pop(origin, None)
            self._schemas.pop(origin, None)

    def close(self, peer: str) -> None:
        """The session with `peer` is over, and with it the paths that it was announcing."""
        for key in [key for key in self._paths if key[0] == peer]:
            del self._paths[key]

    def _check_origin(self, peer: str, origin: str) -> None:
        if origin in self._teachers:
            return
        if peer not in self._teachers:
            raise UnknownPeerError(f"{peer} announced a checkpoint, but is no teacher of this site")
        raise UnknownPeerError(f"{peer} announced a checkpoint of {origin!r}, who is no teacher of this site")

    def accept(self, peer: str, origin: str, announce: Announce) -> Accepted | None:
        """Judge what `peer` announced of its own accord, in the name of `origin` as the body claims, and take note of it if
        it is new; None: it is behind.

        Raises RefusedError.
        """
        self._check_origin(peer, origin)
        known = self._announced.get(origin)
        if known is not None and announce.body == known.body and announce.signature == known.signature:
            return Accepted((known,), is_new=False, pins_schema=False)
        signed = self._verify(peer, origin, announce)
        newest = self._newest.get(origin)
        if peer != origin and newest is not None and signed.version < newest:
            return None
        if (
            known is not None
            and known.version == signed.version
            and known.manifest.kind == signed.manifest.kind
            and known.body != signed.body
        ):
            raise ReplayedError(
                f"two different checkpoints of {origin} claim to be step {signed.version.step} of incarnation "
                f"{signed.version.incarnation}: do two nodes run with its identity?"
            )
        return self._note(origin, (signed,))

    def collect(self, peer: str, origin: str, announce: Announce, asked: CatchUp | None) -> Accepted | None:
        """Judge the next part of a path from `peer`, the answer to `asked`; None as long as there is more to come. `origin`
        is the one that the body claims.

        Raises RefusedError, once for a path.
        """
        self._check_origin(peer, origin)
        path = self._paths.pop((peer, origin), None)
        if path is None or announce.num_more != path.num_more - 1:
            path = _Path()
        path.num_more = announce.num_more or 0
        if path.num_more:
            self._paths[peer, origin] = path
        if path.is_refused:
            return None
        try:
            if asked is None:
                raise MalformedError(f"{peer} announced a path that nobody asked for")
            path.num_manifest_bytes += len(announce.body)
            if path.num_manifest_bytes > MAX_PLAN_MANIFEST_BYTES:
                raise OversizedError(
                    f"{peer} announced a path whose manifests are over the cap of {MAX_PLAN_MANIFEST_BYTES} bytes"
                )
            path.frames.append(self._verify_next(peer, origin, announce, path.frames, asked.held))
        except RefusedError:
            path.frames.clear()
            path.is_refused = True
            raise
        if path.num_more:
            return None
        newest = self._newest.get(origin)
        version = path.frames[-1].version
        if peer != origin and newest is not None and version < newest:
            if version.incarnation < newest.incarnation:
                raise ReplayedError(f"{peer} announced a path of {origin} to an incarnation that is over")
            return Accepted(tuple(path.frames), is_new=False, pins_schema=False)
        return self._note(origin, tuple(path.frames))

    def verify_own(self, peer: str, announce: Announce, public: PublicIdentity) -> SignedManifest:
        """What `peer` shows of this site's own, whose key is `public`. Raises RefusedError."""
        try:
            signed = self._verify_manifest(announce.body, announce.signature, public)
        except SignatureError as error:
            origin = claimed_origin(announce.body)
            raise SignatureError(
                f"{peer} announced a checkpoint in the name of {origin!r}: {error}"
            ) from None
        if signed.manifest.run != self._run:
            raise ReplayedError(
                f"{peer} shows a checkpoint of run {signed.manifest.run!r}, not {self._run!r}"
            )
        return signed

    def _verify_next(
        self,
        peer: str,
        origin: str,
        announce: Announce,
        before: list[SignedManifest],
        held: Version | None,
    ) -> SignedManifest:
        signed = self._verify(peer, origin, announce)
        allowed = (before[-1].version,) if before else (None, held)
        if signed.base not in allowed:
            raise MalformedError(f"{peer} announced a path whose frames do not follow from one another")
        if before and signed.manifest.schema_hash != before[0].manifest.schema_hash:
            raise SchemaMismatchError(f"{peer} announced a path whose frames have different tensors")
        return signed

    def _verify(self, peer: str, origin: str, announce: Announce) -> SignedManifest:
        try:
            signed = self._verify_manifest(announce.body, announce.signature, self._teachers[origin])
        except SignatureError as error:
            of = "" if peer == origin else f" in the name of {origin!r}"
            raise SignatureError(f"{peer} announced a checkpoint{of}: {error}") from None
        manifest = signed.manifest
        if manifest.run != self._run:
            raise ReplayedError(
                f"{peer} announced a checkpoint that belongs to run {manifest.run!r}, not {self._run!r}"
            )
        if manifest.chunk_bytes > self._max_chunk_bytes:
            raise OversizedError(
                f"{peer} announced chunks of {manifest.chunk_bytes} bytes, over this site's window of "
                f"{self._max_chunk_bytes}"
            )
        if manifest.num_bytes > self._max_frame_bytes:
            raise OversizedError(
                f"{peer} announced a frame of {manifest.num_bytes} bytes, over this site's cap of "
                f"{self._max_frame_bytes}"
            )
        return signed

    def _note(self, origin: str, frames: tuple[SignedManifest, ...]) -> Accepted:
        last = frames[-1]
        version, schema_hash = last.version, last.manifest.schema_hash
        newest = self._newest.get(origin)
        if newest is not None and version < newest:
            raise ReplayedError(
                f"{origin} announced step {version.step} of incarnation {version.incarnation} again, after step "
                f"{newest.step} of incarnation {newest.incarnation}"
            )
        pins_schema = self._schemas.get(origin) != schema_hash
        if pins_schema and origin in self._schemas and version.incarnation == self.known_incarnation(origin):
            raise SchemaMismatchError(
                f"{origin} announced other tensors (names, shapes or dtypes) than before in incarnation "
                f"{version.incarnation}: its workers must be launched anew for that"
            )
        is_new = newest is None or version > newest
        if is_new:
            self._newest[origin] = version
            self._schemas[origin] = schema_hash
        if is_new or origin not in self._announced:
            self._announced[origin] = last
        return Accepted(frames, is_new=is_new, pins_schema=pins_schema)
