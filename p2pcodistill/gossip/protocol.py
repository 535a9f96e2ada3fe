"""The gossip protocol of one site as a pure state machine: events in, actions out.

No I/O, no clock, no randomness: the same events at the same times give the same actions, whether they come from ZeroMQ,
from links in memory or from a simulation in virtual time. Nothing that a peer sends raises: what is not acceptable is
refused, reported and forgotten.

`membership` says who may speak, `announce` what teachers have, `transfer` and `plan` what to fetch, `publishing` what
students are told, `serving` what they are given; this module joins them and is what the rest of the package imports
(events and actions included).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from p2pcodistill import telemetry
from p2pcodistill.checkpoint.manifest import MAX_CHUNK_BYTES, SignedManifest, Version
from p2pcodistill.errors import HelloMismatchError, MalformedError, RefusedError, UnknownPeerError
from p2pcodistill.gossip.announce import Accepted, Announcements
from p2pcodistill.gossip.events import (
    AbandonFrame,
    Action,
    BeginFetch,
    ChainBroken,
    CompleteFrame,
    DropChain,
    Event,
    FetchBegun,
    FetchRefused,
    FrameLost,
    FramePublished,
    FrameStored,
    IncarnationRaised,
    KeyframeUnavailable,
    OfferFrame,
    PayloadReceived,
    PeerClosed,
    PeerOpened,
    PinSchema,
    RaiseIncarnation,
    Report,
    RequestKeyframe,
    SendPayload,
    ServeChunk,
    StoreChunk,
    Ticked,
    TrainingFinished,
    send,
)
from p2pcodistill.gossip.membership import Membership, SessionState, members_digest
from p2pcodistill.gossip.messages import (
    MAX_WHY_CHARS,
    Announce,
    CatchUp,
    Chunk,
    Finished,
    Gone,
    Hello,
    Message,
    Payload,
    Refusal,
    Want,
    decode_message,
)
from p2pcodistill.gossip.publishing import Publishing
from p2pcodistill.gossip.serving import Serving
from p2pcodistill.gossip.transfer import Transfers
from p2pcodistill.identity import PublicIdentity

__all__ = [
    "AbandonFrame",
    "Action",
    "BeginFetch",
    "ChainBroken",
    "CompleteFrame",
    "DropChain",
    "Event",
    "FetchBegun",
    "FetchRefused",
    "FrameLost",
    "FramePublished",
    "FrameStored",
    "Gossip",
    "IncarnationRaised",
    "KeyframeUnavailable",
    "OfferFrame",
    "PayloadReceived",
    "PeerClosed",
    "PeerOpened",
    "PinSchema",
    "RaiseIncarnation",
    "Report",
    "RequestKeyframe",
    "SendPayload",
    "ServeChunk",
    "StoreChunk",
    "Ticked",
    "TrainingFinished",
    "members_digest",
]

DEFAULT_WINDOW_BYTES = MAX_CHUNK_BYTES
DEFAULT_STALL_TIMEOUT_S = 10.0


class Gossip:
    """What one site knows and says.

    `members` maps all sites of the run to their public identities, in the order that all agree on; `teachers` and
    `students` are this site's neighbours in the teacher graph. The rest is what the store remembers: `held` maps each
    teacher whose chain is there to the version that it leads to, `own_frames` are all complete frames of this site,
    and `incarnation` and `pinned_schemas` speak for themselves. Announced frames of more than `max_frame_bytes` are
    refused. At most `window_bytes` are asked of a peer and not yet received, and nobody may want more
    of this site in one message; requests of a peer that is silent for `stall_timeout_s` are made anew.
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
        window_bytes: int = DEFAULT_WINDOW_BYTES,
        stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
    ) -> None:
        neighbours = (*teachers, *students)
        if site not in members or site in neighbours or any(peer not in members for peer in neighbours):
            raise ValueError("a site and its neighbours are members of the run, and nobody neighbours itself")
        self._site = site
        self._students = tuple(member for member in members if member in students)
        self._membership = Membership(
            run=run,
            members=tuple(members),
            members_digest=members_digest,
            topology_digest=topology_digest,
            incarnation=incarnation,
        )
        self._announcements = Announcements(
            run=run,
            teachers={member: public for member, public in members.items() if member in teachers},
            held=held,
            pinned_schemas=pinned_schemas,
            max_chunk_bytes=window_bytes,
            max_frame_bytes=max_frame_bytes,
        )
        self._transfers = Transfers(
            {member: held[member] for member in members if member in teachers and member in held},
            window_bytes=window_bytes,
            stall_timeout_s=stall_timeout_s,
        )
        self._publishing = Publishing(own_frames)
        self._believed: set[str] = set()  # peers that told of a past life of this site
        self._serving = Serving(window_bytes=window_bytes)
        self._serving.hold(site, self._publishing.kept, now_s=0.0)

    @property
    def incarnation(self) -> int:
        """What this site publishes under."""
        return self._membership.incarnation

    @property
    def peers_ready(self) -> tuple[str, ...]:
        """The peers whose hello was accepted in the current session, in member order."""
        return self._membership.ready_peers

    @property
    def students_finished(self) -> bool:
        """Whether every student said, in any session, that its training is over."""
        return all(map(self._membership.is_finished, self._students))

    def frames_in_use(self, now_s: float) -> frozenset[str]:
        """The frames that the store must not prune: this site's own chain, and what is being fetched, here or by a peer."""
        own = (signed.frame_id for signed in self._publishing.kept)
        return frozenset((*own, *self._transfers.fetching, *self._serving.in_use(now_s)))

    def handle(self, event: Event, now_s: float) -> list[Action]:
        """What follows from `event`, in order. `now_s` is monotonic; only differences matter."""
        actions = self._handle(event, now_s)
        return actions + self._transfers.next_actions(now_s)

    def _handle(self, event: Event, now_s: float) -> list[Action]:
        match event:
            case PeerOpened(peer):
                leaving = self._leave(peer, "a new session took its place", now_s)
                known = self._announcements.known_incarnation(peer)
                return [*leaving, send(peer, self._membership.open(peer, known_incarnation=known))]
            case PeerClosed(peer, why):
                leaving = self._leave(peer, why, now_s)
                self._membership.close(peer)
                return leaving
            case PayloadReceived(peer, payload):
                try:
                    return self._receive(peer, payload, now_s)
                except RefusedError as error:
                    return [_refused(peer, error)]
            case FrameLost(frame_id):
                self._publishing.lose(frame_id)
                self._serving.hold(self._site, self._publishing.kept, now_s)
            case FramePublished(signed):
                return self._publish(signed, now_s)
            case FetchBegun(frame_id, present):
                self._transfers.begin(frame_id, present)
            case FrameStored(frame_id, held):
                return self._offer_stored(frame_id, held, now_s)
            case FetchRefused(frame_id, reason, why):
                return self._give_up(frame_id, reason, why)
            case ChainBroken(origin):
                self._transfers.break_chain(origin)
                return [DropChain(origin)]
            case KeyframeUnavailable():
                return self._answer_waiting()
            case TrainingFinished():
                self._membership.has_finished = True
                return [*(send(peer, Finished()) for peer in self.peers_ready), *self._answer_waiting()]
            case IncarnationRaised(incarnation):
                self._membership.raise_incarnation(incarnation)
            case Ticked():
                self._transfers.tick(now_s)
        return []

    # --- sessions --------------------------------------------------------------------------------------------

    def _leave(self, peer: str, why: str, now_s: float) -> list[Action]:
        if self._membership.state_of(peer) is not SessionState.READY:
            return []
        self._announcements.close(peer)
        self._transfers.close(peer)
        self._publishing.close(peer)
        self._serving.close(peer, now_s)
        return [Report(telemetry.PeerDisconnected(peer, why))]

    def _receive(self, peer: str, payload: Payload, now_s: float) -> list[Action]:
        match self._membership.state_of(peer):
            case SessionState.AWAITING_HELLO:
                message = decode_message(payload)
                if not isinstance(message, Hello):
                    raise MalformedError(f"{peer} sent {type(message).__name__} before its hello")
                return self._greet(peer, message)
            case SessionState.READY:
                return self._obey(peer, decode_message(payload), now_s)
            case _:  # the session was refused, or is over: not even worth decoding
                return []

    def _greet(self, peer: str, hello: Hello) -> list[Action]:
        try:
            self._membership.accept(peer, hello)
        except HelloMismatchError as error:
            self._membership.refuse(peer)
            return [send(peer, Refusal(error.reason, str(error)[:MAX_WHY_CHARS])), _refused(peer, error)]
        self._transfers.open(peer)
        actions: list[Action] = [Report(telemetry.PeerConnected(peer))]
        actions += self._raise_incarnation(peer, hello.known_incarnation_of_you)
        if peer in self._students:
            actions += self._announce_to(peer)
        if self._membership.has_finished:
            actions.append(send(peer, Finished()))
        return actions

    def _raise_incarnation(self, peer: str, known_incarnation: int) -> list[Action]:
        is_newer = known_incarnation >= self.incarnation
        if not (is_newer and self._publishing.is_from_past_life(peer, known_incarnation)):
            return []
        if peer in self._believed:  # a past life can be remembered only once: this one keeps us busy
            return []
        self._believed.add(peer)
        self._membership.raise_incarnation(known_incarnation + 1)
        return [RaiseIncarnation(self.incarnation)]

    # --- messages of ready peers -------------------------------------------------------------------------------

    def _obey(self, peer: str, message: Message, now_s: float) -> list[Action]:
        match message:
            case Announce(num_more=None):
                accepted = self._announcements.accept(peer, message)
                self._transfers.announce(peer, accepted.frames[-1])
                return self._note(accepted)
            case Announce():
                return self._follow(peer, message)
            case CatchUp():
                if peer not in self._students:
                    raise UnknownPeerError(f"{peer} asked for a path, but is no student of this site")
                return self._answer(peer, message, at_any_price=self._membership.has_finished)
            case Want(frame_id, indices):
                if not self._serving.want(peer, message):
                    return [send(peer, Gone(frame_id))]
                return [ServeChunk(peer, frame_id, index) for index in indices]
            case Chunk():
                return self._transfers.receive(peer, message, now_s)
            case Gone(frame_id):
                self._transfers.lose_source(peer, frame_id)
            case Finished():
                self._membership.finish(peer)
            case Refusal(reason, why):
                return self._be_refused(peer, reason, why, now_s)
            case Hello():
                raise MalformedError(f"{peer} sent a second hello in one session")
        return []

    def _follow(self, peer: str, announce: Announce) -> list[Action]:
        try:
            accepted = self._announcements.collect(peer, announce, self._transfers.asked(peer))
            if accepted is None:
                return []
            self._transfers.follow(peer, accepted.frames)
            return self._note(accepted)
        finally:
            if not announce.num_more:
                self._transfers.forgo(peer)

    def _note(self, accepted: Accepted) -> list[Action]:
        if not accepted.is_new:
            return []
        manifest = accepted.frames[-1].manifest
        version = manifest.version
        announced = telemetry.VersionAnnounced(
            manifest.origin, version.incarnation, version.step, manifest.num_bytes
        )
        pin = [PinSchema(manifest.origin, manifest.schema_hash)] if accepted.pins_schema else []
        return [*pin, Report(announced)]

    def _be_refused(self, peer: str, reason: str, why: str, now_s: float) -> list[Action]:
        why = f"{peer} refuses us: {why}"
        leaving = self._leave(peer, why, now_s)
        self._membership.refuse(peer)
        return [*leaving, Report(telemetry.Refused(peer, reason, why))]

    # --- frames: this site's own, and those that have arrived ------------------------------------------------------

    def _publish(self, signed: SignedManifest, now_s: float) -> list[Action]:
        is_announced = self._publishing.publish(signed)
        self._serving.hold(self._site, self._publishing.kept, now_s)
        actions: list[Action] = []
        if is_announced:
            ready = self.peers_ready
            actions += [
                action for peer in self._students if peer in ready for action in self._announce_to(peer)
            ]
        return actions + self._answer_waiting()

    def _announce_to(self, peer: str) -> list[Action]:
        known = self._membership.known_incarnation_of_us(peer)
        announcement = self._publishing.announce_to(peer, known_incarnation=known)
        return [send(peer, announcement)] if announcement else []

    def _answer(self, peer: str, request: CatchUp, *, at_any_price: bool) -> list[Action]:
        known = self._membership.known_incarnation_of_us(peer)
        path = self._publishing.answer(peer, request, known_incarnation=known, at_any_price=at_any_price)
        is_due = self._publishing.take_request() and not self._membership.has_finished
        return [*(send(peer, part) for part in path), *([RequestKeyframe()] if is_due else [])]

    def _answer_waiting(self) -> list[Action]:
        waiting = self._publishing.waiting.items()
        return [action for peer, asked in waiting for action in self._answer(peer, asked, at_any_price=True)]

    def _offer_stored(self, frame_id: str, held: Version | None, now_s: float) -> list[Action]:
        download = self._transfers.store(frame_id, held)
        if download is None:
            return []
        signed = download.offer.signed
        manifest = signed.manifest
        self._serving.hold(manifest.origin, [signed], now_s)
        fetched = telemetry.FrameFetched(
            origin=manifest.origin,
            incarnation=manifest.version.incarnation,
            step=manifest.version.step,
            kind=manifest.kind,
            num_bytes=manifest.num_bytes,
            num_resent_bytes=download.num_resent_bytes,
            duration_s=now_s - download.started_s,
        )
        return [Report(fetched), *([OfferFrame(signed)] if download.leads_further else [])]

    def _give_up(self, frame_id: str, reason: str, why: str) -> list[Action]:
        download = self._transfers.give_up(frame_id)
        if download is None:
            return []
        origin = download.offer.signed.manifest.origin
        return [AbandonFrame(frame_id), Report(telemetry.Refused(origin, reason, why))]


def _refused(peer: str, error: RefusedError) -> Report:
    return Report(telemetry.Refused(peer, error.reason, str(error)))
