"""Which versions are known: the newest of each origin wins, and what that means for an announcement.

For now a frame is announced by its origin alone, so its manifest must be signed by the very peer that sends it.
Relays will carry other members' announcements; then the origin's key comes from the member list just the same.

An origin's schema (names, shapes and dtypes of its tensors) is pinned, and stays as it is within one incarnation. A later
incarnation may bring another one, which replaces the pin: somebody mended a configuration and launched the workers anew.
Whether a schema fits this site's student is not known here; the ranks decide that when they decode the frame, and refuse
one that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from p2pcodistill.checkpoint.manifest import SignedManifest, Version, verify_manifest
from p2pcodistill.errors import (
    OversizedError,
    ReplayedError,
    SchemaMismatchError,
    SignatureError,
    UnknownPeerError,
)
from p2pcodistill.gossip.messages import Announce
from p2pcodistill.identity import PublicIdentity


@dataclass(frozen=True, slots=True)
class Accepted:
    """A verified announcement. `is_new`: the version was not known; `pins_schema`: its schema is not the pinned one."""

    signed: SignedManifest
    is_new: bool
    pins_schema: bool


class Announcements:
    """The newest version known of this site and of each of its teachers."""

    def __init__(
        self,
        *,
        site: str,
        run: str,
        teachers: Mapping[str, PublicIdentity],
        newest: Mapping[str, SignedManifest],
        pinned_schemas: Mapping[str, bytes],
        max_chunk_bytes: int,
        max_frame_bytes: int,
    ) -> None:
        self._site = site
        self._run = run
        self._teachers = dict(teachers)
        self._newest = {origin: newest[origin] for origin in (site, *self._teachers) if origin in newest}
        self._schemas = dict(pinned_schemas)
        self._remembered_incarnation = self.known_incarnation(site)
        self._told_incarnation: dict[str, int] = {}
        self._max_chunk_bytes = max_chunk_bytes
        self._max_frame_bytes = max_frame_bytes

    def known_incarnation(self, origin: str) -> int:
        """The highest incarnation under which `origin` is known to have published, 0 for none."""
        newest = self._newest.get(origin)
        return newest.manifest.version.incarnation if newest else 0

    def publish(self, signed: SignedManifest) -> bool:
        """Take note of a frame of this site. False when a newer one is out already: it is never announced."""
        newest = self._newest.get(self._site)
        if newest is not None and signed.manifest.version < newest.manifest.version:
            return False
        self._newest[self._site] = signed
        return True

    def announce_to(self, student: str, *, known_incarnation: int) -> Announce | None:
        """What to tell a student that knows of `known_incarnation` of this site; it counts as told.

        None when there is nothing that it would accept: nothing is published, or only under an older incarnation,
        which has to be raised first.
        """
        newest = self._newest.get(self._site)
        if newest is None or newest.manifest.version.incarnation < known_incarnation:
            return None
        self._told_incarnation[student] = newest.manifest.version.incarnation
        return Announce(newest.body, newest.signature)

    def is_from_past_life(self, peer: str, known_incarnation: int) -> bool:
        """Whether `peer` knows of an incarnation of this site that this site did not tell it, as far as is remembered.

        What this site published in a life that its store has no memory of must not be mistaken for what it will.
        """
        return known_incarnation > max(self._remembered_incarnation, self._told_incarnation.get(peer, 0))

    def accept(self, peer: str, announce: Announce) -> Accepted:
        """Judge what `peer` announced, and take note of it if it is new. Raises RefusedError."""
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
        newest = self._newest.get(peer)
        incarnation = manifest.version.incarnation
        pins_schema = self._schemas.get(peer) != manifest.schema_hash
        if pins_schema and peer in self._schemas and incarnation == self.known_incarnation(peer):
            raise SchemaMismatchError(
                f"{peer} announced other tensors (names, shapes or dtypes) than before in incarnation {incarnation}: "
                "its workers must be launched anew for that"
            )
        if newest is not None and manifest.version <= newest.manifest.version:
            if signed.body == newest.body:
                return Accepted(signed, is_new=False, pins_schema=False)
            raise _not_newer(peer, manifest.version, newest.manifest.version)
        self._newest[peer] = signed
        self._schemas[peer] = manifest.schema_hash
        return Accepted(signed, is_new=True, pins_schema=pins_schema)


def _not_newer(origin: str, version: Version, newest: Version) -> ReplayedError:
    if version == newest:
        return ReplayedError(
            f"two different checkpoints of {origin} claim to be step {version.step} of incarnation "
            f"{version.incarnation}: do two nodes run with its identity?"
        )
    return ReplayedError(
        f"{origin} announced step {version.step} of incarnation {version.incarnation} again, after step "
        f"{newest.step} of incarnation {newest.incarnation}"
    )
