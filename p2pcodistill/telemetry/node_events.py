"""What a node says: of itself, its peers and links, the frames that move, its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from p2pcodistill.telemetry.event import Event


@dataclass(frozen=True, slots=True)
class NodeStarted(Event):
    """The node listens. `neighbours` are the members that this site exchanges with."""

    name: ClassVar[str] = "node-started"
    site: str
    run: str
    listen: str
    incarnation: int
    neighbours: list[str]
    pid: int


@dataclass(frozen=True, slots=True)
class ConfigReloaded(Event):
    """The site's file was read again while the node ran: these of its keys took effect, and these wait for a restart."""

    name: ClassVar[str] = "config-reloaded"
    changed: list[str]
    needs_restart: list[str]


@dataclass(frozen=True, slots=True)
class NodeStopping(Event):
    """A first SIGINT or SIGTERM arrived: the ranks are asked to stop at a step boundary. A second one ends them at once."""

    name: ClassVar[str] = "node-stopping"
    signal: str


@dataclass(frozen=True, slots=True)
class NodeStopped(Event):
    """The node has shut down. `reason` is `finished`, `stopped` (a signal) or `failed`."""

    name: ClassVar[str] = "node-stopped"
    site: str
    reason: str


@dataclass(frozen=True, slots=True)
class PeerConnected(Event):
    """A neighbour's hello was accepted."""

    name: ClassVar[str] = "peer-connected"
    peer: str


@dataclass(frozen=True, slots=True)
class PeerDisconnected(Event):
    """The last connection with a neighbour is gone; the transport keeps trying."""

    name: ClassVar[str] = "peer-disconnected"
    peer: str
    why: str


@dataclass(frozen=True, slots=True)
class PeerSuspected(Event):
    """A neighbour with a session has not answered pings for `silent_s`: others are asked before it."""

    name: ClassVar[str] = "peer-suspected"
    peer: str
    silent_s: float


@dataclass(frozen=True, slots=True)
class PeerRecovered(Event):
    """A suspected neighbour has spoken again, after `silent_s`."""

    name: ClassVar[str] = "peer-recovered"
    peer: str
    silent_s: float


@dataclass(frozen=True, slots=True)
class PeerQuarantined(Event):
    """A peer kept sending what was refused, for `reason` in the end: it is not listened to for `duration_s`."""

    name: ClassVar[str] = "peer-quarantined"
    peer: str
    reason: str
    num_refusals: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class MemberTrustChanged(Event):
    """This site's allow-list has changed: `member` is trusted from now on, or not any more."""

    name: ClassVar[str] = "member-trust-changed"
    member: str
    is_trusted: bool
    why: str


@dataclass(frozen=True, slots=True)
class RelayStarted(Event):
    """This site fetches frames of `origin`, who does not teach it, for `student`, who cannot connect with it."""

    name: ClassVar[str] = "relay-started"
    origin: str
    student: str


@dataclass(frozen=True, slots=True)
class RelayStopped(Event):
    """Nobody needs this site to relay `origin` any more."""

    name: ClassVar[str] = "relay-stopped"
    origin: str


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """Something from outside was refused; `reason` is a class-level word of `errors.RefusedError`, `why` the sentence.

    One event may stand for `num_times` alike.
    """

    name: ClassVar[str] = "refused"
    peer: str | None
    reason: str
    why: str
    num_times: int = 1


@dataclass(frozen=True, slots=True)
class VersionAnnounced(Event):
    """A verified manifest of `origin` arrived: this is the newest version known here."""

    name: ClassVar[str] = "version-announced"
    origin: str
    incarnation: int
    step: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FrameFetched(Event):
    """A frame (`kind`: keyframe or delta) is complete, verified and stored. `num_resent_bytes` arrived more than once."""

    name: ClassVar[str] = "frame-fetched"
    origin: str
    incarnation: int
    step: int
    kind: str
    num_bytes: int
    num_resent_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class FrameRelayed(Event):
    """The same of a frame that this site, no student of `origin`, fetched to pass it on."""

    name: ClassVar[str] = "frame-relayed"
    origin: str
    incarnation: int
    step: int
    kind: str
    num_bytes: int
    num_resent_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class FramePublished(Event):
    """This site's frame was encoded, signed, stored and told to gossip. `num_fp16_bytes`: the same tensors as raw fp16.

    `kind` is keyframe or delta. A keyframe may have the step of the delta before it: made because a student needed one.
    """

    name: ClassVar[str] = "frame-published"
    incarnation: int
    step: int
    kind: str
    num_bytes: int
    num_fp16_bytes: int


@dataclass(frozen=True, slots=True)
class TrafficMeasured(Event):
    """Bytes handed to and received from the transport since the node started, envelopes included."""

    name: ClassVar[str] = "traffic-measured"
    num_bytes_sent: int
    num_bytes_received: int
    num_bytes_sent_by_peer: dict[str, int]
    num_bytes_received_by_peer: dict[str, int]


@dataclass(frozen=True, slots=True)
class LinkMeasured(Event):
    """What the link with a neighbour carried lately, at best, in each direction, and its round trip; None: not measured yet.

    `num_connection_losses` counts sessions that ended since the node started. `queued_bytes` of chunks have been asked of
    this site and have not reached the peer.
    """

    name: ClassVar[str] = "link-measured"
    peer: str
    upload_mbit: float | None
    download_mbit: float | None
    round_trip_ms: float | None
    num_connection_losses: int
    queued_bytes: int


@dataclass(frozen=True, slots=True)
class GroupStarted(Event):
    """The site's workers were launched; `attempt` counts from 0 within one life of the node."""

    name: ClassVar[str] = "group-started"
    attempt: int
    num_ranks: int
    pid: int


@dataclass(frozen=True, slots=True)
class GroupExited(Event):
    """The workers ended. `restart_in_s` is None when the node will not start them again."""

    name: ClassVar[str] = "group-exited"
    exit_status: int
    restart_in_s: float | None
