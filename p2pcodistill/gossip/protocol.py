"""The gossip protocol of one site as a pure state machine: events in, actions out.

No I/O, no clock, no randomness: the same events at the same times give the same actions, whether they come from ZeroMQ,
from links in memory or from a simulation in virtual time. Nothing that a peer sends raises: what is not acceptable is
refused, reported and forgotten.

`sessions` says who may speak, and who may not any more, `health` who is alive, `finishing` who needs nothing more; `obeying`
what follows from messages, `hearing` from announcements, `storing` from what happens in the store; `transfer` and `plan`
what to fetch, `teaching` what students are told, `serving` what they are given, `passing` what is done with the frames of
others. This module joins them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from p2pcodistill.checkpoint.manifest import MAX_CHUNK_BYTES, SignedManifest, Version, verify_manifest
from p2pcodistill.errors import FloodedError, MalformedError, RefusedError
from p2pcodistill.gossip.announce import Announcements, Verify
from p2pcodistill.gossip.codec import decode_message
from p2pcodistill.gossip.events import (
    AbandonFrame,
    Action,
    ChainBroken,
    DropChain,
    Event,
    FetchBegun,
    FetchRefused,
    FrameLost,
    FramePublished,
    FrameStored,
    IncarnationRaised,
    KeyframeUnavailable,
    MemberRestored,
    MemberRevoked,
    PayloadReceived,
    PeerClosed,
    PeerOpened,
    RaiseIncarnation,
    Report,
    Ticked,
    TrainingFinished,
    send,
)
from p2pcodistill.gossip.finishing import Finishing
from p2pcodistill.gossip.health import Health
from p2pcodistill.gossip.hearing import Hearing
from p2pcodistill.gossip.membership import Membership, SessionState
from p2pcodistill.gossip.messages import Hello, Payload
from p2pcodistill.gossip.obeying import Obeying
from p2pcodistill.gossip.passing import Passing
from p2pcodistill.gossip.publishing import Publishing
from p2pcodistill.gossip.serving import Serving
from p2pcodistill.gossip.sessions import Sessions
from p2pcodistill.gossip.sharing import Sharing
from p2pcodistill.gossip.storing import Storing
from p2pcodistill.gossip.teaching import Teaching
from p2pcodistill.gossip.transfer import Transfers
from p2pcodistill.gossip.trust import Trust
from p2pcodistill.gossip.window import LinkEstimate
from p2pcodistill.identity import PublicIdentity
from p2pcodistill.telemetry import node_events

DEFAULT_WINDOW_BYTES = 8 * MAX_CHUNK_BYTES
"""What a link of 1 Gbit/s holds at a round trip of a quarter of a second. A window is as large as its link makes it."""
DEFAULT_STALL_TIMEOUT_S = 10.0
DEFAULT_RELAY_AFTER_S = 10.0
DEFAULT_PING_INTERVAL_S = 5.0


class Gossip:
    """What one site knows and says.

    `members` maps all sites of the run to their public identities, in the order that all agree on; `teachers` and
    `students` are this site's neighbours in the teacher graph. The rest is what the store remembers: `held` maps each
    teacher whose chain is there to the version that it leads to, `own_frames` are all complete frames of this site,
    and `incarnation` and `pinned_schemas` speak for themselves. Announced frames of more than `max_frame_bytes` are
    refused. At most `window_bytes` are asked of a peer and not yet received, and nobody may want more
    of this site in one message; requests of a peer that is silent for `stall_timeout_s` are made anew.

    `students_of` names for every member those that may ever learn from it (it is only read, and kept as it is), `chains`
    holds what the store has of other origins, those frames that the origin itself signed: so students of one origin help
    each other. A teacher without a session for `relay_after_s` is asked for through others; whether this site does as much
    for them, `relay` says. A peer that is silent for `ping_interval_s` is pinged. `sign` makes the signature of this site's
    identity, `verify` makes out every manifest.
    """

    def __init__(
        self,
        site: str,
        run: str,
        members: Mapping[str, PublicIdentity],
        teachers: Collection[str],
        students: Collection[str],
        members_digest: bytes,
        topology_digest: bytes,
        incarnation: int,
        held: Mapping[str, Version],
        own_frames: Sequence[SignedManifest],
        pinned_schemas: Mapping[str, bytes],
        *,
        max_frame_bytes: int,
        sign: Callable[[bytes], bytes],
        window_bytes: int = DEFAULT_WINDOW_BYTES,
        stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
        students_of: Mapping[str, Collection[str]] | None = None,
        chains: Mapping[str, Sequence[SignedManifest]] | None = None,
        relay: bool = True,
        relay_after_s: float = DEFAULT_RELAY_AFTER_S,
        ping_interval_s: float = DEFAULT_PING_INTERVAL_S,
        verify: Verify = verify_manifest,
    ) -> None:
        neighbours = (*teachers, *students)
        if site not in members or site in neighbours or any(peer not in members for peer in neighbours):
            raise ValueError("a site and its neighbours are members of the run, and nobody neighbours itself")
        self._site, self._teachers = site, tuple(teachers)
        self._membership = Membership(
            run=run,
            members=tuple(members),
            members_digest=members_digest,
            topology_digest=topology_digest,
            incarnation=incarnation,
        )
        self._announcements = Announcements(
            run=run,
            teachers={teacher: members[teacher] for teacher in teachers},
            held=held,
            pinned_schemas=pinned_schemas,
            max_chunk_bytes=window_bytes,
            max_frame_bytes=max_frame_bytes,
            verify=verify,
        )
        self._finishing = Finishing(
            site, run, members, sign=sign, known_incarnation=self._announcements.known_incarnation
        )
        sharing = Sharing(site, {} if students_of is None else students_of, chains or {})
        self._transfers = Transfers(
            {teacher: held[teacher] for teacher in teachers if teacher in held},
            window_bytes=window_bytes,
            stall_timeout_s=stall_timeout_s,
            share_of=sharing.share_of,
        )
        self._sharing = sharing
        self._passing = Passing(
            members=members,
            teachers=teachers,
            sharing=sharing,
            transfers=self._transfers,
            announcements=self._announcements,
            is_ready=self._membership.is_ready,
            finished=self._finishing.statement_of,
            relays=relay,
            relay_after_s=relay_after_s,
        )
        self._trust = Trust()
        self._health = Health(ping_interval_s=ping_interval_s)
        self._publishing = Publishing(own_frames)
        is_student = frozenset(students)
        self._teaching = Teaching(
            site,
            [member for member in members if member in is_student],
            membership=self._membership,
            finishing=self._finishing,
            publishing=self._publishing,
            raise_incarnation=self._raise_incarnation,
        )
        self._sessions = Sessions(
            self._membership,
            self._trust,
            self._health,
            known_incarnation=self._announcements.known_incarnation,
            begin=self._begin,
            end=self._end,
        )
        hearing = Hearing(
            site,
            members[site],
            membership=self._membership,
            announcements=self._announcements,
            publishing=self._publishing,
            transfers=self._transfers,
            sharing=sharing,
            passing=self._passing,
            refuse=self._sessions.refuse,
            is_revoked=self._trust.is_revoked,
            raise_incarnation=self._raise_incarnation,
        )
        self._serving = Serving(window_bytes=window_bytes, download_of=self._transfers.download_of)
        self._serving.hold(site, self._publishing.kept, now_s=0.0)
        for origin, frames in (chains or {}).items():
            self._serving.hold(origin, frames, now_s=0.0)
        self._storing = Storing(
            site,
            publishing=self._publishing,
            teaching=self._teaching,
            transfers=self._transfers,
            sharing=sharing,
            passing=self._passing,
            serving=self._serving,
        )
        self._obeying = Obeying(
            site,
            membership=self._membership,
            finishing=self._finishing,
            sessions=self._sessions,
            trust=self._trust,
            health=self._health,
            announcements=self._announcements,
            hearing=hearing,
            transfers=self._transfers,
            teaching=self._teaching,
            passing=self._passing,
            serving=self._serving,
        )

    @property
    def incarnation(self) -> int:
        """What this site publishes under."""
        return self._membership.incarnation

    @property
    def peers_ready(self) -> tuple[str, ...]:
        """The peers whose hello was accepted in the current session, in the order of their hellos."""
        return self._membership.ready_peers

    @property
    def students_finished(self) -> bool:
        """Whether every trusted student has signed that its training is over, and was not launched again since."""
        return all(
            self._finishing.is_finished(student) or self._trust.is_revoked(student)
            for student in self._teaching.students
        )

    @property
    def teachers_told(self) -> bool:
        """Whether every trusted teacher has finished itself, or is ready, or its relay is: if this site has finished, it was
        told."""
        return all(
            self._membership.is_ready(teacher)
            or self._membership.is_ready(self._passing.relay_of(teacher) or "")
            or self._finishing.is_finished(teacher)
            or self._trust.is_revoked(teacher)
            for teacher in self._teachers
        )

    @property
    def links(self) -> dict[str, LinkEstimate]:
        """What downloads have shown of the links with peers."""
        return self._transfers.links

    @property
    def suspects(self) -> tuple[str, ...]:
        """The ready peers that have not answered for a while."""
        return self._health.suspects

    @property
    def relayed_origins(self) -> tuple[str, ...]:
        """The origins whose frames this site holds for others alone."""
        return self._passing.relayed_origins

    def frames_in_use(self, now_s: float) -> frozenset[str]:
        """The frames that the store must not prune: this site's own chain, what it relays, and what is being fetched, here
        or by a peer."""
        return self._storing.in_use(now_s)

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What follows from `event`, in order. `now_s` is monotonic; only differences matter."""
        if type(event) is PayloadReceived:  # by far the most
            try:
                actions = self._receive(event.peer, event.payload, now_s)
            except RefusedError as error:
                actions = self._sessions.refuse(event.peer, error, now_s)
        else:
            actions = self._handle(event, now_s)
        for action in self._transfers.next_actions(now_s):
            actions.append(action)
            if type(action) is AbandonFrame:
                actions += self._sharing.abandon(action.frame_id)
        return actions

    def _handle(self, event: Event, now_s: float) -> list[Action]:
        match event:
            case FetchBegun(frame_id, present):
                self._transfers.begin(frame_id, present)
            case FrameStored(frame_id, held):
                return self._storing.store(frame_id, held, now_s)
            case PeerOpened(peer):
                return self._sessions.open(peer, now_s)
            case PeerClosed(peer, why):
                return self._sessions.close(peer, why, now_s)
            case FrameLost(frame_id):
                self._storing.lose(frame_id, now_s)
            case FramePublished(signed):
                return self._storing.publish(signed, now_s)
            case FetchRefused(frame_id, reason, why):
                return self._storing.give_up(frame_id, reason, why)
            case ChainBroken(origin):
                self._transfers.break_chain(origin)
                return [DropChain(origin)]
            case KeyframeUnavailable():
                return self._teaching.answer_waiting()
            case TrainingFinished():
                return [*self._say_finished(), *self._teaching.answer_waiting()]
            case IncarnationRaised(incarnation):
                self._membership.raise_incarnation(incarnation)
            case MemberRevoked(member, why):
                return [*self._sessions.revoke(member, why, now_s), *self._passing.revoke(member)]
            case MemberRestored(member):
                self._trust.restore(member)
                report = Report(node_events.MemberTrustChanged(member, True, "restored"))
                restored = self._passing.restore(member, self.peers_ready, now_s)
                return [report, *restored, *self._sessions.greet_again(member)]
            case Ticked():
                return self._tick(now_s)
        return []

    def _tick(self, now_s: float) -> list[Action]:
        self._transfers.tick(now_s)
        actions: list[Action] = []
        pings, suspected = self._health.tick(now_s)
        for peer, ping in pings:
            actions.append(send(peer, ping))
        for event in suspected:
            self._transfers.suspect(event.peer, is_suspect=True)
            actions.append(Report(event))
        actions += self._sessions.release(now_s)
        return actions + self._passing.tick(self.peers_ready, now_s)

    # --- sessions --------------------------------------------------------------------------------------------

    def _receive(self, peer: str, payload: Payload, now_s: float) -> list[Action]:
        if self._membership.is_ready(peer):
            message = decode_message(payload)
            recovered = self._health.hear(peer, now_s)
            if recovered is not None:
                self._transfers.suspect(peer, is_suspect=False)
                return [Report(recovered), *self._obeying.obey(peer, message, now_s)]
            return self._obeying.obey(peer, message, now_s)
        match self._membership.state_of(peer):
            case SessionState.AWAITING_HELLO:
                message = decode_message(payload)
                if not isinstance(message, Hello):
                    raise MalformedError(f"{peer} sent {type(message).__name__} before its hello")
                return self._sessions.greet(peer, message, now_s)
            case SessionState.REFUSED_BY_PEER:
                message = decode_message(payload)
                if isinstance(message, Hello):  # it has changed its mind
                    again = self._sessions.greet_again(peer)
                    greeted = self._sessions.greet(peer, message, now_s)
                    # Once in a while, that is: each time it is told all that a new session is.
                    return [*again, *greeted, *self._sessions.count_refusal(peer, FloodedError.reason, now_s)]
        return []  # the session was refused, or is over: not even worth decoding

    def _begin(self, peer: str, hello: Hello) -> list[Action]:
        """`peer` became ready."""
        self._finishing.greet(peer, hello.incarnation)
        self._transfers.open(peer)
        actions = self._teaching.open(peer, hello.known_incarnation_of_you)
        statement = self._finishing.statement_of(self._site)
        if statement is not None:
            actions.append(send(peer, statement))
        return actions + self._passing.open(peer)

    def _end(self, peer: str, now_s: float) -> list[Action]:
        """`peer` is ready no more."""
        self._announcements.close(peer)
        self._transfers.close(peer)
        self._teaching.close(peer)
        self._serving.close(peer, now_s)
        return self._passing.close(peer, now_s)

    # --- what this site says of itself -------------------------------------------------------------------------------

    def _raise_incarnation(self, incarnation: int) -> list[Action]:
        """Publish under at least this incarnation from now on."""
        self._membership.raise_incarnation(incarnation)
        again = self._say_finished() if self._finishing.has_finished else []
        return [RaiseIncarnation(self._membership.incarnation), *again]

    def _say_finished(self) -> list[Action]:
        statement = self._finishing.finish(self._membership.incarnation)
        return [send(peer, statement) for peer in self.peers_ready]
