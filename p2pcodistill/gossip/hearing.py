"""What follows from what peers announce: of teachers, of origins that are relayed, and of this site's own past."""

from __future__ import annotations

from collections.abc import Callable

from p2pcodistill.checkpoint.manifest import claimed_origin
from p2pcodistill.errors import OversizedError, RefusedError, ReplayedError, SchemaMismatchError
from p2pcodistill.gossip.announce import Accepted, Announcements
from p2pcodistill.gossip.events import Action, PinSchema, Report, send
from p2pcodistill.gossip.membership import Membership
from p2pcodistill.gossip.messages import Announce
from p2pcodistill.gossip.passing import Passing
from p2pcodistill.gossip.publishing import Publishing
from p2pcodistill.gossip.sharing import Sharing
from p2pcodistill.gossip.transfer import Transfers
from p2pcodistill.identity import PublicIdentity
from p2pcodistill.telemetry import node_events


class Hearing:
    """Announcements, judged by `announce`, and handed on to those whom they concern."""

    def __init__(
        self,
        site: str,
        public: PublicIdentity,
        *,
        membership: Membership,
        announcements: Announcements,
        publishing: Publishing,
        transfers: Transfers,
        sharing: Sharing,
        passing: Passing,
        refuse: Callable[[str, RefusedError, float], list[Action]],
        is_revoked: Callable[[str], bool],
        raise_incarnation: Callable[[int], list[Action]],
    ) -> None:
        """`public` is this site's own key; `refuse` is called for what is a peer's own fault; of who `is_revoked` nothing is
        heard; `raise_incarnation` is called with the one to publish under from now on."""
        self._site, self._public = site, public
        self._membership, self._announcements, self._publishing = membership, announcements, publishing
        self._transfers, self._sharing, self._passing = transfers, sharing, passing
        self._refuse, self._is_revoked = refuse, is_revoked
        self._raise_incarnation = raise_incarnation
        self._reminded: dict[str, str] = {}  # what was shown to origins that have lost their memory

    def hear(self, peer: str, announce: Announce, now_s: float) -> list[Action]:
        """A ready peer announced a frame. Raises RefusedError."""
        origin = claimed_origin(announce.body)
        if self._passing.is_over(origin) or self._is_revoked(origin):
            if announce.num_more == 0:
                self._transfers.forgo(peer, origin)  # that was the answer
            return []  # others need not know that it is of no interest here
        if origin == self._site:
            return self._recall(peer, announce)
        try:
            if announce.num_more is None:
                accepted = self._announcements.accept(peer, origin, announce)
                if accepted is None:
                    # Without a session with the origin only others can tell it what it may have forgotten.
                    return [] if self._membership.is_ready(origin) else self._passing.remind(peer, origin)
                self._transfers.announce(peer, accepted.frames[-1], has_all=announce.has_all)
                return self._note(peer, accepted, has_all=announce.has_all)
            return self._hear_path(peer, origin, announce)
        except (OversizedError, ReplayedError, SchemaMismatchError) as error:
            if peer == origin and isinstance(error, ReplayedError):
                return [*self._refuse(peer, error, now_s), *self._remind(peer)]
            # Not counted: it is the origin's fault and not the peer's, or a matter of this site's own caps and schema.
            return [Report(node_events.Refused(peer, error.reason, str(error)))]

    def _hear_path(self, peer: str, origin: str, announce: Announce) -> list[Action]:
        try:
            asked = self._transfers.asked(peer, origin)
            accepted = self._announcements.collect(peer, origin, announce, asked)
            if accepted is None:
                return []
            self._transfers.follow(peer, accepted.frames, has_all=announce.has_all)
            noted = self._note(peer, accepted, has_all=announce.has_all)
            return noted + self._passing.tell_path(accepted.frames)
        finally:
            if not announce.num_more:
                self._transfers.forgo(peer, origin)

    def _note(self, peer: str, accepted: Accepted, *, has_all: bool) -> list[Action]:
        passed = self._passing.announce(peer, accepted.frames, has_all=has_all, is_new=accepted.is_new)
        manifest = accepted.frames[-1].manifest
        if not accepted.is_new or self._passing.is_relayed(manifest.origin):
            return passed
        version = manifest.version
        announced = node_events.VersionAnnounced(
            manifest.origin, version.incarnation, version.step, manifest.num_bytes
        )
        pin = [PinSchema(manifest.origin, manifest.schema_hash)] if accepted.pins_schema else []
        return [*pin, Report(announced), *passed]

    # --- who has lost its memory -------------------------------------------------------------------------------------

    def _remind(self, origin: str) -> list[Action]:
        """`origin` announces what is older than what it signed once: it has lost its memory, and is shown the proof."""
        newest = self._announcements.newest(origin) or next(iter(self._sharing.frames_of(origin)[-1:]), None)
        if newest is None or not self._membership.is_ready(origin):
            return []
        if self._reminded.get(origin) == newest.frame_id:
            return []
        self._reminded[origin] = newest.frame_id
        return [send(origin, Announce(newest.body, newest.signature))]

    def _recall(self, peer: str, announce: Announce) -> list[Action]:
        """`peer` shows what this site has signed once. If it knows nothing of that, it begins a new incarnation."""
        newest = self._publishing.newest_version
        recalled = self._announcements.verify_own(peer, announce, self._public)
        version = recalled.version
        is_past = version.incarnation < self._membership.incarnation or (
            newest is not None and version < newest
        )
        if is_past or recalled.frame_id in [signed.frame_id for signed in self._publishing.kept]:
            return []
        why = (
            f"{peer} knows step {version.step} of incarnation {version.incarnation} of this site, which has no memory "
            "of it: if its store was not lost, another node runs with its identity"
        )
        reported = Report(node_events.Refused(None, ReplayedError.reason, why))
        return [reported, *self._raise_incarnation(version.incarnation + 1)]
