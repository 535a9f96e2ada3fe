"""What follows from the messages of ready peers: each is counted, and handed to whom it concerns."""

from __future__ import annotations

from p2pcodistill.errors import ChecksumError, MalformedError
from p2pcodistill.gossip.announce import Announcements
from p2pcodistill.gossip.events import Action, ServeChunk, StoreChunk, send
from p2pcodistill.gossip.finishing import Finishing
from p2pcodistill.gossip.health import Health
from p2pcodistill.gossip.hearing import Hearing
from p2pcodistill.gossip.membership import MAX_CREDIBLE_INCARNATION, Membership
from p2pcodistill.gossip.messages import (
    Announce,
    CatchUp,
    Chunk,
    Finished,
    Follow,
    Gone,
    Have,
    Hello,
    Message,
    NoPath,
    Ping,
    Pong,
    Refusal,
    Unfollow,
    Want,
)
from p2pcodistill.gossip.passing import Passing
from p2pcodistill.gossip.serving import Serving
from p2pcodistill.gossip.sessions import Sessions
from p2pcodistill.gossip.teaching import Teaching
from p2pcodistill.gossip.transfer import Transfers
from p2pcodistill.gossip.trust import FOLLOW_COST, Trust


class Obeying:
    """Does what ready peers ask for, as far as they may."""

    def __init__(
        self,
        site: str,
        *,
        membership: Membership,
        finishing: Finishing,
        sessions: Sessions,
        trust: Trust,
        health: Health,
        announcements: Announcements,
        hearing: Hearing,
        transfers: Transfers,
        teaching: Teaching,
        passing: Passing,
        serving: Serving,
    ) -> None:
        self._site = site
        self._membership, self._finishing, self._sessions = membership, finishing, sessions
        self._trust, self._health = trust, health
        self._announcements, self._hearing, self._transfers = announcements, hearing, transfers
        self._teaching, self._passing, self._serving = teaching, passing, serving

    def obey(self, peer: str, message: Message, now_s: float) -> list[Action]:
        """What follows from `message` of a ready peer. Raises RefusedError."""
        if type(message) is Chunk:  # it was asked for, or is refused
            return self._take(peer, message, now_s)
        self._trust.count_message(peer, now_s, cost=FOLLOW_COST if type(message) is Follow else 1.0)
        match message:
            case Want(frame_id, indices):
                if not self._serving.want(peer, message, now_s):
                    return [send(peer, Gone(frame_id))]
                return [ServeChunk(peer, frame_id, index) for index in indices]
            case Announce():
                return self._hearing.hear(peer, message, now_s)
            case CatchUp(origin=None):
                return self._teaching.answer(peer, message)
            case CatchUp():
                return self._passing.answer(peer, message, now_s)
            case NoPath(origin):
                return self._passing.find_no_path(peer, origin)
            case Have():
                self._passing.have(peer, message)
            case Follow():
                return self._be_followed(peer, message)
            case Unfollow(origin):
                if origin == self._site:
                    self._teaching.unfollow(peer)
                else:
                    self._passing.unfollow(peer, origin, now_s)
            case Ping(nonce):
                return [send(peer, Pong(nonce))]
            case Pong():
                rtt_s = self._health.answer(peer, message, now_s)
                if rtt_s is not None:
                    self._transfers.observe_rtt(peer, rtt_s)
            case Gone(frame_id):
                self._transfers.lose_source(peer, frame_id)
            case Finished():
                if self._finishing.hear(peer, message):  # others are told once, however often it is said
                    return self._passing.finish(peer, message)
            case Refusal(reason, why):
                return self._sessions.be_refused(peer, reason, why, now_s)
            case Hello():
                raise MalformedError(f"{peer} sent a second hello in one session")
        return []

    def _take(self, peer: str, chunk: Chunk, now_s: float) -> list[Action]:
        actions = self._transfers.receive(peer, chunk, now_s)
        if not actions:
            return []
        if isinstance(actions[0], StoreChunk):
            return actions + self._passing.receive(self._transfers.download_of(chunk.frame_id))
        return actions + self._sessions.count_refusal(peer, ChecksumError.reason, now_s)

    def _be_followed(self, peer: str, follow: Follow) -> list[Action]:
        origin, is_own = follow.origin, follow.origin == self._site
        known = self._membership.incarnation if is_own else self._announcements.known_incarnation(origin)
        if follow.known_incarnation > max(MAX_CREDIBLE_INCARNATION, known):
            raise MalformedError(
                f"{peer} claims to know incarnation {follow.known_incarnation} of {origin!r}, which cannot be"
            )
        return self._teaching.follow(peer, follow) if is_own else self._passing.follow(peer, follow)
