"""Passing frames on: what joins fetching, sharing and relaying, as actions.

`sharing` knows what others are told, `relay` who follows whom, `transfer` and `announce` what this site fetches and accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from p2pcodistill.checkpoint.manifest import SignedManifest
from p2pcodistill.errors import UnknownPeerError
from p2pcodistill.gossip.announce import Announcements
from p2pcodistill.gossip.download import Download
from p2pcodistill.gossip.events import Action, DropChain, Report, send
from p2pcodistill.gossip.messages import CatchUp, Finished, Follow, Have, NoPath, Unfollow
from p2pcodistill.gossip.relay import MAX_FOLLOWERS, Orphans, Relay
from p2pcodistill.gossip.sharing import Sharing
from p2pcodistill.gossip.transfer import Transfers
from p2pcodistill.identity import PublicIdentity
from p2pcodistill.telemetry import node_events

KEYFRAME_REST_VERSIONS = 8
"""A teacher is asked for a keyframe for those who follow it here no more than once in so many new versions."""


class Passing:
    """Frames of other origins: whom they are told to, whom they are fetched for, and who is asked for them."""

    def __init__(
        self,
        *,
        members: Mapping[str, PublicIdentity],
        teachers: Collection[str],
        sharing: Sharing,
        transfers: Transfers,
        announcements: Announcements,
        is_ready: Callable[[str], bool],
        finished: Callable[[str], Finished | None],
        relays: bool,
        relay_after_s: float,
    ) -> None:
        """`finished` tells what a member has said of the end of its training."""
        self._members = members
        self._teachers = dict.fromkeys(teachers)
        self._sharing = sharing
        self._transfers = transfers
        self._announcements = announcements
        self._is_ready, self._finished = is_ready, finished
        self._relays = relays
        self._relay = Relay()
        self._once_relayed: dict[str, None] = {}
        self._num_versions_to_rest: dict[
            str, int
        ] = {}  # of teachers that were asked for a keyframe for others
        self._orphans = Orphans(teachers, relay_after_s=relay_after_s)

    @property
    def relayed_origins(self) -> tuple[str, ...]:
        """The origins whose frames are fetched for others alone."""
        return self._relay.origins

    def is_relayed(self, origin: str) -> bool:
        """Whether frames of `origin` are fetched for others alone."""
        return self._relay.relays(origin)

    def is_over(self, origin: str) -> bool:
        """Whether frames of `origin` were relayed once, and are no more: what still comes of them is no offence."""
        return origin in self._once_relayed and not self._relay.relays(origin)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def open(self, peer: str) -> list[Action]:
        """`peer` became ready."""
        relay = self._orphans.open(peer)
        thanks = [send(relay, Unfollow(peer))] if relay is not None and self._is_ready(relay) else []
        return [*thanks, *self._sharing.open(peer, self._teachers)]

    def close(self, peer: str, now_s: float) -> list[Action]:
        """The session with `peer` is over: nobody can be told of its frames here, and it follows nobody."""
        self._orphans.close(peer, now_s, is_teacher=peer in self._teachers)
        self._relay.leave(peer)
        self._sharing.close(peer)
        actions = [*self._sharing.tell_all(peer), *self._turn_away(peer)]
        self._relay.close(peer, now_s)
        for origin in self._relay.origins:
            self._look_for_followers(origin, now_s)
        return actions

    def tick(self, ready: Collection[str], now_s: float) -> list[Action]:
        """Time has passed."""
        actions = self._sharing.tick(self._transfers.downloads)
        actions += [
            send(relay, Unfollow(teacher)) for relay, teacher in self._orphans.take_silent(ready, now_s)
        ]
        for peer, teacher in self._orphans.tick(ready, now_s):
            held = self._transfers.plan(teacher).held
            known = self._announcements.known_incarnation(teacher)
            actions.append(send(peer, Follow(teacher, held, known)))
        for origin in self._relay.take_idle(now_s):
            actions += self._stop(origin)
        for origin, overdue in self._relay.take_overdue(now_s):
            actions += [send(peer, NoPath(origin)) for peer in overdue]
            if self._relay.relays(origin):
                self._transfers.stop_waiting(origin)
        return actions

    # --- following ---------------------------------------------------------------------------------------------------

    def follow(self, peer: str, request: Follow) -> list[Action]:
        """`peer` asks to be told of the frames of another member. Raises UnknownPeerError if that one does not teach it."""
        origin = request.origin
        if origin not in self._members or not self._sharing.is_student(peer, origin):
            raise UnknownPeerError(f"{peer} asked to follow {origin!r}, who does not teach it")
        is_taught = origin in self._teachers
        is_possible = (is_taught or self._relays) and self._is_ready(origin)
        has_room = is_taught or self._relay.relays(origin) or self._relay.has_room
        if not (is_possible and has_room) or len(self._sharing.followers(origin)) >= MAX_FOLLOWERS:
            return [send(peer, Unfollow(origin))]
        actions: list[Action] = []
        is_new = peer not in self._sharing.followers(origin)
        if not is_taught:
            if not self._relay.relays(origin):
                self._once_relayed[origin] = None
                self._announcements.add(origin, self._members[origin])
                self._transfers.relay(origin, request.held)
                actions.append(Report(node_events.RelayStarted(origin, peer)))
            if self._relay.follow(origin, request.known_incarnation):
                known = self._relay.known_incarnation(origin)
                actions.append(send(origin, Follow(origin, request.held, known)))
        actions += self._sharing.follow(peer, origin, self._announcements.newest(origin))
        if is_new:
            both_ways = (origin, self._finished(peer)), (peer, self._finished(origin))
            actions += [send(to, statement) for to, statement in both_ways if statement is not None]
        return actions

    def finish(self, peer: str, statement: Finished) -> list[Action]:
        """`peer` brought news of a member whose training is over: they are passed on where it cannot say so itself."""
        member = statement.member
        followed = [origin for origin in self._sharing.followed_by(member) if self._is_ready(origin)]
        told = dict.fromkeys((*followed, *self._sharing.followers(member)))
        return [send(other, statement) for other in told if other != peer]

    def relay_of(self, teacher: str) -> str | None:
        """Who was asked to relay `teacher`, which cannot be reached, and has not declined."""
        return self._orphans.relay_of(teacher)

    def unfollow(self, peer: str, origin: str, now_s: float) -> None:
        """`peer` need not be told of `origin` any more, or does not relay it, or not any more."""
        if not self._orphans.decline(peer, origin):
            self._sharing.unfollow(peer, origin)
            self._relay.leave(peer, origin)
            self._look_for_followers(origin, now_s)

    def revoke(self, member: str) -> list[Action]:
        """Nothing of `member` is passed on, or asked of others, any more."""
        relay = self._orphans.open(member)
        thanks = [send(relay, Unfollow(member))] if relay is not None and self._is_ready(relay) else []
        actions = [*thanks, *self._turn_away(member), *self._transfers.drop(member)]
        if self._relay.relays(member):
            self._relay.drop(member)
            actions += self._stop(member)
        self._announcements.remove(member, forgetting=False)
        self._sharing.drop(member)
        return actions

    def restore(self, member: str, ready: Collection[str], now_s: float) -> list[Action]:
        """`member` may teach again, if it is a teacher."""
        if member not in self._teachers:
            return []
        self._announcements.add(member, self._members[member])
        self._orphans.close(member, now_s, is_teacher=True)
        return [action for peer in ready for action in self._sharing.open(peer, [member])]

    # --- frames ------------------------------------------------------------------------------------------------------

    def announce(
        self, peer: str, frames: tuple[SignedManifest, ...], *, has_all: bool, is_new: bool
    ) -> list[Action]:
        """`peer` announced these frames of one origin, which were verified."""
        for signed in frames:
            self._sharing.hear(peer, signed, has_all=has_all)
        if not is_new:
            return []
        origin = frames[-1].manifest.origin
        self._orphans.hear(peer, origin)
        if origin in self._num_versions_to_rest:
            self._num_versions_to_rest[origin] = max(0, self._num_versions_to_rest[origin] - 1)
        return self._sharing.announce(frames[-1])

    def remind(self, peer: str, origin: str) -> list[Action]:
        """`peer` is behind in what it knows of `origin`."""
        newest = self._announcements.newest(origin)
        return [] if newest is None else self._sharing.tell(peer, newest)

    def tell_path(self, frames: tuple[SignedManifest, ...]) -> list[Action]:
        """A path has arrived: those who wait for it are told."""
        origin = frames[0].manifest.origin
        actions: list[Action] = []
        for peer in self._relay.take_waiting(origin, frames[0].base):
            actions += self._sharing.answer(peer, frames, has_all=False)
        if self._relay.relays(origin):
            self._ask_for_next(origin)
        return actions

    def have(self, peer: str, have: Have) -> None:
        """`peer` tells what it holds of a frame. Raises MalformedError."""
        signed = self._transfers.have(peer, have)
        if signed is not None:
            self._sharing.hear(peer, signed, has_all=True)

    def receive(self, download: Download | None) -> list[Action]:
        """A chunk of a frame that is being fetched was stored."""
        return [] if download is None else self._sharing.receive(download)

    # --- catching up -------------------------------------------------------------------------------------------------

    def answer(self, peer: str, request: CatchUp, now_s: float) -> list[Action]:
        """`peer` asks for a path of another origin. Raises UnknownPeerError if that one does not teach it."""
        origin = request.origin or ""
        if not self._sharing.is_student(peer, origin):
            raise UnknownPeerError(f"{peer} asked for a path of {origin!r}, who does not teach it")
        path = self._sharing.find_path(peer, request, origin)
        if path:
            return self._sharing.answer(peer, path, has_all=True)
        if peer not in self._sharing.followers(origin):
            return [send(peer, NoPath(origin))]
        if origin in self._teachers:
            return self._ask_for_keyframe(peer, request, origin, now_s)
        if not self._relay.relays(origin):
            return [send(peer, NoPath(origin))]
        newest = self._announcements.newest_version(origin)
        if newest is not None and request.held is not None and request.held >= newest:
            return [send(peer, NoPath(origin))]  # nothing newer is known
        is_first = self._relay.next_waiting(origin) is None
        self._relay.wait(peer, origin, request, now_s)
        if is_first:
            self._transfers.relay_path(origin, request)
        return []

    def find_no_path(self, peer: str, origin: str) -> list[Action]:
        """`peer` knows no path: another is asked, and another relay, too, if it is one."""
        asked = self._transfers.asked(peer, origin)
        if asked is not None:
            self._transfers.forgo(peer, origin, is_needed=peer != origin)
        if peer == origin:
            return self._answer_no_path(origin, asked) if asked and self._relay.relays(origin) else []
        return [send(peer, Unfollow(origin))] if self._orphans.decline(peer, origin) else []

    # --- inside ------------------------------------------------------------------------------------------------------

    def _ask_for_keyframe(self, peer: str, request: CatchUp, origin: str, now_s: float) -> list[Action]:
        """`peer` follows a teacher of this site, whose chain here does not help it: perhaps a local keyframe shortened it.

        A keyframe helps everyone. It is fetched before what this site needs itself, and so only now and then.
        """
        if self._relay.next_waiting(origin) is None:
            if self._num_versions_to_rest.get(origin, 0) or not self._is_ready(origin):
                return [send(peer, NoPath(origin))]
            self._num_versions_to_rest[origin] = KEYFRAME_REST_VERSIONS
            self._transfers.relay_path(origin, CatchUp(None, afresh=True))
        self._relay.wait(peer, origin, request, now_s)
        return []

    def _answer_no_path(self, origin: str, asked: CatchUp) -> list[Action]:
        """`origin`, which is relayed, has nothing newer for those on whose behalf it was asked."""
        actions: list[Action] = [
            send(peer, NoPath(origin)) for peer in self._relay.take_asking(origin, asked)
        ]
        self._ask_for_next(origin)
        return actions

    def _ask_for_next(self, origin: str) -> None:
        """`origin`, which is relayed, is asked for what the next one waits for."""
        if (request := self._relay.next_waiting(origin)) is not None:
            self._transfers.relay_path(origin, request)

    def _turn_away(self, origin: str) -> list[Action]:
        actions: list[Action] = []
        for follower in self._sharing.followers(origin):
            self._sharing.unfollow(follower, origin)
            self._relay.leave(follower, origin)
            actions.append(send(follower, Unfollow(origin)))
        return actions

    def _look_for_followers(self, origin: str, now_s: float) -> None:
        if not self._sharing.followers(origin):
            self._relay.idle(origin, now_s)

    def _stop(self, origin: str) -> list[Action]:
        actions = self._transfers.forget(origin)
        self._announcements.remove(origin)
        self._sharing.drop(origin)
        if self._is_ready(origin):
            actions.append(send(origin, Unfollow(origin)))
        return [*actions, DropChain(origin), Report(node_events.RelayStopped(origin))]
