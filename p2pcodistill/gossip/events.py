"""What goes into the protocol (events, past tense) and what comes out of it (actions, imperative).

The node feeds events to `gossip.protocol.Gossip.handle` one by one and carries out the actions that it gets back, in
order, before it feeds the next. `peer` is always the member name of the key that the transport authenticated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from p2pcodistill.checkpoint.manifest import SignedManifest, Version
from p2pcodistill.gossip.codec import encode_message
from p2pcodistill.gossip.messages import Lane, Message, Payload, lane_of
from p2pcodistill.telemetry.event import Event as TelemetryEvent

# --- events ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PeerOpened:
    """The transport has a session with `peer`: both lanes are there."""

    peer: str


@dataclass(frozen=True, slots=True)
class PeerClosed:
    """The session with `peer` is over; whatever was under way in it is lost."""

    peer: str
    why: str


@dataclass(frozen=True, slots=True)
class PayloadReceived:
    """`peer` sent this within the current session."""

    peer: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class FramePublished:
    """This site's checkpoint is signed and in the store.

    It is newer than all before it, or a keyframe of the newest version, which somebody needed.
    """

    signed: SignedManifest


@dataclass(frozen=True, slots=True)
class FetchBegun:
    """The store has a place for the frame of a `BeginFetch`; `present` are the chunks that are there, verified."""

    frame_id: str
    present: frozenset[int]


@dataclass(frozen=True, slots=True)
class FrameStored:
    """The frame of a `CompleteFrame` is durably in the store.

    `held` is the version that the store's chain of the frame's origin leads to now, None if there is no chain.
    """

    frame_id: str
    held: Version | None


@dataclass(frozen=True, slots=True)
class FrameLost:
    """A frame of this site, or of another origin, is no longer in the store: pruned, or found damaged.

    Obligation: it is fed for every frame of another origin that is pruned, and for what a `ServeChunk` names in vain.
    """

    frame_id: str


@dataclass(frozen=True, slots=True)
class FetchRefused:
    """The store does not take the frame of a `BeginFetch`, or not to its end. `reason` and `why` as in a refusal."""

    frame_id: str
    reason: str
    why: str


@dataclass(frozen=True, slots=True)
class ChainBroken:
    """The ranks could not apply the chain of this origin's frames that the store holds."""

    origin: str


@dataclass(frozen=True, slots=True)
class TrainingFinished:
    """This site's training is over: it learns from nobody any more, and no keyframe can be made on request. It goes on
    serving."""


@dataclass(frozen=True, slots=True)
class KeyframeUnavailable:
    """Nobody can make the keyframe of a `RequestKeyframe` now: whoever waits for it gets what there is."""


@dataclass(frozen=True, slots=True)
class IncarnationRaised:
    """The node began a new incarnation of its own accord, as it does for each launch of its workers."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class MemberRevoked:
    """The key of this member is no longer trusted here. What the store holds of it stays, but nothing more is taken."""

    member: str
    why: str


@dataclass(frozen=True, slots=True)
class MemberRestored:
    """The key of this member is trusted again."""

    member: str


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed; fed about once a second, so that stalled requests are noticed."""


Event: TypeAlias = (
    PeerOpened
    | PeerClosed
    | PayloadReceived
    | FramePublished
    | FetchBegun
    | FrameStored
    | FrameLost
    | FetchRefused
    | ChainBroken
    | TrainingFinished
    | IncarnationRaised
    | KeyframeUnavailable
    | MemberRevoked
    | MemberRestored
    | Ticked
)

# --- actions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendPayload:
    """Send this to `peer`.

    Obligation: a session delivers control payloads all and in order, or ends (a control payload that cannot be
    queued is a reason to close the session). Bulk may be dropped: it is asked for again.
    """

    peer: str
    lane: Lane
    payload: Payload


@dataclass(frozen=True, slots=True)
class BeginFetch:
    """Open or continue the partial frame of this manifest in the store, then feed `FetchBegun` (or `FetchRefused`)."""

    signed: SignedManifest


@dataclass(frozen=True, slots=True)
class StoreChunk:
    """Write a chunk whose hash was verified."""

    frame_id: str
    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CompleteFrame:
    """All chunks were handed over: make the frame durable, then feed `FrameStored`."""

    frame_id: str


@dataclass(frozen=True, slots=True)
class AbandonFrame:
    """Drop a partial frame; nothing more will be said about it."""

    frame_id: str


@dataclass(frozen=True, slots=True)
class ServeChunk:
    """Read a chunk and send it to `peer` as `Chunk`; when the frame is no longer there, send `Gone` instead.

    The frame may be one that is being fetched, of which this chunk was stored.
    """

    peer: str
    frame_id: str
    index: int


@dataclass(frozen=True, slots=True)
class PinSchema:
    """Remember that checkpoints of `origin` have this schema from now on, in place of any other, across restarts."""

    origin: str
    schema_hash: bytes


@dataclass(frozen=True, slots=True)
class RaiseIncarnation:
    """Neighbours know of a past life of this site: save this incarnation, and publish under it from now on.

    Obligation: the own frames that are kept are signed again under it, and fed as `FramePublished`, oldest first.
    """

    incarnation: int


@dataclass(frozen=True, slots=True)
class RequestKeyframe:
    """Ask the ranks for a keyframe of what they published last: a student needs one.

    Nothing is owed: if it cannot be made, whatever they publish next serves.
    """


@dataclass(frozen=True, slots=True)
class DropChain:
    """Forget all complete frames of `origin` that the store holds: a teacher, or one that was relayed."""

    origin: str


@dataclass(frozen=True, slots=True)
class OfferFrame:
    """Hand the chain of this frame's origin to the group as a teacher: with this frame, which is complete and verified, it
    leads further than before."""

    signed: SignedManifest


@dataclass(frozen=True, slots=True)
class Report:
    """Tell telemetry."""

    event: TelemetryEvent


Action: TypeAlias = (
    SendPayload
    | BeginFetch
    | StoreChunk
    | CompleteFrame
    | AbandonFrame
    | ServeChunk
    | PinSchema
    | RaiseIncarnation
    | RequestKeyframe
    | DropChain
    | OfferFrame
    | Report
)


def send(peer: str, message: Message) -> SendPayload:
    """The action that sends `message` on its lane."""
    return SendPayload(peer, lane_of(message), encode_message(message))
