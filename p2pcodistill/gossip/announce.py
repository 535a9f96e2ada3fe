"""What teachers announce: which versions are known of each, and what that means for an announcement.

For now a frame is announced by its origin alone, so its manifest must be signed by the very peer that sends it.
Relays will carry other members' announcements; then the origin's key comes from the member list just the same.

A version is announced once, when it is published, and again in a new session; whatever is older is refused. Only the answer
to a request to catch up, a path, may go back to older frames, on its way to the newest. Two frames of one version may be the
same checkpoint: a delta frame, and the keyframe of the reference that it yields.

An origin's schema (names, shapes and dtypes of its tensors) is pinned, and stays as it is within one incarnation. A later
incarnation may bring another one, which replaces the pin: somebody mended a configuration and launched the workers anew.
Whether a schema fits this site's student is not known here; the ranks decide that when they decode the frame, and refuse
one that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2pcodistill.checkpoint.manifest import SignedManifest, Version, verify_manifest
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
from p2pcodistill.identity import PublicIdentity


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
    ) -> None:
        self._run = run
        self._teachers = dict(teachers)
        self._newest = {origin: held[origin] for origin in self._teachers if origin in held}
        self._announced: dict[
            str, SignedManifest
        ] = {}  # the first frame of the newest version, since the start
        self._schemas = dict(pinned_schemas)
        self._paths: dict[str, _Path] = {}
        self._max_chunk_bytes = max_chunk_bytes
        self._max_frame_bytes = max_frame_bytes

    def known_incarnation(self, origin: str) -> int:
        """The highest incarnation under which `origin` is known to have published, 0 for none."""
        newest = self._newest.get(origin)
        return newest.incarnation if newest else 0

    def close(self, peer: str) -> None:
        """The session with `peer` is over, and with it the path that it was announcing."""
        self._paths.pop(peer, None)

    def accept(self, peer: str, announce: Announce) -> Accepted:
        """Judge what `peer` announced of its own accord, and take note of it if it is new. Raises RefusedError."""
        signed = self._verify(peer, announce)
        known = self._announced.get(peer)
        if (
            known is not None
            and known.version == signed.version
            and known.manifest.kind == signed.manifest.kind
            and known.body != signed.body
        ):
            raise ReplayedError(
                f"two different checkpoints of {peer} claim to be step {signed.version.step} of incarnation "
                f"{signed.version.incarnation}: do two nodes run with its identity?"
            )
        return self._note(peer, (signed,))

    def collect(self, peer: str, announce: Announce, asked: CatchUp | None) -> Accepted | None:
        """Judge the next part of a path from `peer`, the answer to `asked`; None as long as there is more to come.

        Raises RefusedError, once for a path.
        """
        path = self._paths.pop(peer, None)
        if path is None or announce.num_more != path.num_more - 1:
            path = _Path()
        path.num_more = announce.num_more or 0
        if path.num_more:
            self._paths[peer] = path
        if path.is_refused:
            return None
        try:
            if asked is None:
                raise MalformedError(f"{peer} announced a path that nobody asked for")
            path.frames.append(self._verify_next(peer, announce, path.frames, asked.held))
        except RefusedError:
            path.is_refused = True
            raise
        return None if path.num_more else self._note(peer, tuple(path.frames))

    def _verify_next(
        self, peer: str, announce: Announce, before: list[SignedManifest], held: Version | None
    ) -> SignedManifest:
        signed = self._verify(peer, announce)
        allowed = (before[-1].version,) if before else (None, held)
        if signed.base not in allowed:
            raise MalformedError(f"{peer} announced a path whose frames do not follow from one another")
        if before and signed.manifest.schema_hash != before[0].manifest.schema_hash:
            raise SchemaMismatchError(f"{peer} announced a path whose frames have different tensors")
        return signed

    def _verify(self, peer: str, announce: Announce) -> SignedManifest:
        if peer not in self._teachers:
            raise UnknownPeerError(f"{peer} announced a checkpoint, but is no teacher of this site")
        signed = verify_manifest(announce.body, announce.signature, self._teachers[peer])
        manifest = signed.manifest
        if manifest.origin != peer:
            raise SignatureError(f"{peer} signed a checkpoint in the name of {manifest.origin!r}")
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

    def _note(self, peer: str, frames: tuple[SignedManifest, ...]) -> Accepted:
        last = frames[-1]
        version, schema_hash = last.version, last.manifest.schema_hash
        newest = self._newest.get(peer)
        if newest is not None and version < newest:
            raise ReplayedError(
                f"{peer} announced step {version.step} of incarnation {version.incarnation} again, after step "
                f"{newest.step} of incarnation {newest.incarnation}"
            )
        pins_schema = self._schemas.get(peer) != schema_hash
        if pins_schema and peer in self._schemas and version.incarnation == self.known_incarnation(peer):
            raise SchemaMismatchError(
                f"{peer} announced other tensors (names, shapes or dtypes) than before in incarnation "
                f"{version.incarnation}: its workers must be launched anew for that"
            )
        is_new = newest is None or version > newest
        if is_new:
            self._newest[peer] = version
            self._announced[peer] = last
            self._schemas[peer] = schema_hash
        return Accepted(frames, is_new=is_new, pins_schema=pins_schema)
