"""What this site does as a teacher: whom it tells of its own frames, and how it answers those who fall behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from p2pcodistill.checkpoint.manifest import SignedManifest
from p2pcodistill.errors import UnknownPeerError
from p2pcodistill.gossip.codec import encode_message
from p2pcodistill.gossip.events import Action, RequestKeyframe, SendPayload, send
from p2pcodistill.gossip.finishing import Finishing
from p2pcodistill.gossip.membership import Membership
from p2pcodistill.gossip.messages import (
    Announce,
    CatchUp,
    Follow,
    Lane,
    NoPath,
    Payload,
    Unfollow,
)
from p2pcodistill.gossip.publishing import Publishing
from p2pcodistill.gossip.relay import MAX_FOLLOWERS


class Teaching:
    """The students of one site, and the peers that follow it to relay its frames to them."""

    def __init__(
        self,
        site: str,
        students: Sequence[str],
        *,
        membership: Membership,
        finishing: Finishing,
        publishing: Publishing,
        raise_incarnation: Callable[[int], list[Action]],
    ) -> None:
        """`raise_incarnation` is called with the one to publish under from now on."""
        self._site, self._students = site, tuple(students)
        self._membership, self._finishing, self._publishing = membership, finishing, publishing
        self._raise_incarnation = raise_incarnation
        self._followers: dict[str, None] = {}
        self._encoded: tuple[Announce, Payload] | None = None  # the newest: it goes to everyone
        self._believed: set[str] = set()  # peers that told of a past life of this site

    @property
    def students(self) -> tuple[str, ...]:
        """Those who learn from this site."""
        return self._students

    # --- who is told -------------------------------------------------------------------------------------------------

    def open(self, peer: str, known_incarnation: int) -> list[Action]:
        """`peer` became ready, and has seen this incarnation of this site (0: none)."""
        actions = self._remember(peer, known_incarnation)
        return actions + self._announce_to(peer) if peer in self._students else actions

    def close(self, peer: str) -> None:
        """The session with `peer` is over."""
        self._publishing.close(peer)
        self._followers.pop(peer, None)

    def follow(self, peer: str, request: Follow) -> list[Action]:
        """`peer` asks to be told of this site's frames, to relay them."""
        if peer not in self._followers and len(self._followers) >= MAX_FOLLOWERS:
            return [send(peer, Unfollow(self._site))]
        known = self._membership.known_incarnation_of_us(peer)
        if peer in self._followers and request.known_incarnation <= known:
            return []  # it has been told
        self._followers[peer] = None
        self._membership.know(peer, request.known_incarnation)
        return [*self._remember(peer, request.known_incarnation), *self._announce_to(peer)]

    def unfollow(self, peer: str) -> None:
        """`peer` need not be told any more."""
        self._followers.pop(peer, None)

    def is_told(self, peer: str) -> bool:
        """Whether `peer` is told of this site's frames, to learn from them or to relay them."""
        return peer in self._students or peer in self._followers

    # --- what is told ------------------------------------------------------------------------------------------------

    def publish(self, signed: SignedManifest) -> list[Action]:
        """A frame of this site is in the store."""
        actions: list[Action] = []
        if self._publishing.publish(signed):
            for peer in dict.fromkeys((*self._students, *self._followers)):
                if self._membership.is_ready(peer):
                    actions += self._announce_to(peer)
        return actions + self.answer_waiting()

    def answer(self, peer: str, request: CatchUp) -> list[Action]:
        """`peer` asks for a path to this site's newest version. Raises UnknownPeerError, or MalformedError."""
        if not self.is_told(peer):
            raise UnknownPeerError(f"{peer} asked for a path, but is no student of this site")
        return self._answer(peer, request, at_any_price=self._finishing.has_finished)

    def answer_waiting(self) -> list[Action]:
        """Those who wait for a keyframe get what there is."""
        waiting = self._publishing.waiting.items()
        return [action for peer, asked in waiting for action in self._answer(peer, asked, at_any_price=True)]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _announce_to(self, peer: str) -> list[Action]:
        known = self._membership.known_incarnation_of_us(peer)
        announcement = self._publishing.announce_to(peer, known_incarnation=known)
        if announcement is None:
            return []
        if self._encoded is None or self._encoded[0] is not announcement:
            self._encoded = announcement, encode_message(announcement)
        return [SendPayload(peer, Lane.CONTROL, self._encoded[1])]

    def _answer(self, peer: str, request: CatchUp, *, at_any_price: bool) -> list[Action]:
        known = self._membership.known_incarnation_of_us(peer)
        path = self._publishing.answer(peer, request, known_incarnation=known, at_any_price=at_any_price)
        if not path and peer not in self._publishing.waiting:
            return [send(peer, NoPath(self._site))]  # it is not behind
        is_due = self._publishing.take_request() and not self._finishing.has_finished
        return [*(send(peer, part) for part in path), *([RequestKeyframe()] if is_due else [])]

    def _remember(self, peer: str, known_incarnation: int) -> list[Action]:
        """`peer` has seen this incarnation of this site: if it is of a past life, a higher one begins."""
        is_newer = known_incarnation >= self._membership.incarnation
        if not (is_newer and self._publishing.is_from_past_life(known_incarnation)):
            return []
        if peer in self._believed:  # a past life can be remembered only once: this one keeps us busy
            return []
        self._believed.add(peer)
        return self._raise_incarnation(known_incarnation + 1)
