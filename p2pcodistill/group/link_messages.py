"""What rank 0 and the node say to each other over the link, as small messages; frames go by file.

Rank 0 writes an encoded frame into the outbox folder, renames it to its final name and says `FrameReady`; the node takes the
file and answers `FrameTaken`. The node says `FrameOffered` for the newest checkpoint of each teacher: a chain of verified
files, which the ranks read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import astuple, dataclass
from typing import Any, TypeAlias

import msgpack

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.errors import MalformedError
from p2pcodistill.telemetry.records import Record, from_record

MAX_LINK_MESSAGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FrameOffer:
    """The newest checkpoint of a teacher that the node holds, as a chain of complete, verified frames.

    `frames` are (incarnation, step, file name in `folder`) of each, the keyframe first; the last one's version is the
    offer's. A file never changes, and is there at least until two newer offers of the teacher have been made.
    """

    origin: str
    incarnation: int
    step: int
    folder: str
    frames: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """rank -> node, first message: rank 0 of the launch that was given `token` is there."""

    token: str


@dataclass(frozen=True, slots=True)
class FrameReady:
    """rank -> node: an encoded frame of this site lies at `path`, in the outbox, for the node to take.

    A delta frame moves the reference of `base_step` to that of `step`; a keyframe has no `base_step`.
    """

    path: str
    step: int
    base_step: int | None
    codec: str
    schema_hash: bytes
    num_fp16_bytes: int


@dataclass(frozen=True, slots=True)
class ReferenceReady:
    """rank -> node: a keyframe of a teacher's checkpoint, as the ranks have it, in the outbox: in place of a long chain."""

    path: str
    origin: str
    incarnation: int
    step: int
    codec: str
    schema_hash: bytes
    num_fp16_bytes: int


@dataclass(frozen=True, slots=True)
class ChainBroken:
    """rank -> node: the chain that was offered as this checkpoint of `origin` could not be applied."""

    origin: str
    incarnation: int
    step: int


@dataclass(frozen=True, slots=True)
class EventHappened:
    """rank -> node: a telemetry record for the site's event log."""

    record: Record


@dataclass(frozen=True, slots=True)
class Left:
    """rank -> node, last message: all that this launch had to say has been said."""


@dataclass(frozen=True, slots=True)
class VersionKnown:
    """node -> rank: `origin`, a teacher, announced this version `age_s` seconds ago; it may still be on its way."""

    origin: str
    incarnation: int
    step: int
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Welcome:
    """node -> rank, answer to `Joined`: what the node holds for the teachers now, what they have announced, and which of
    them are `revoked`."""

    offers: tuple[FrameOffer, ...]
    known: tuple[VersionKnown, ...] = ()
    revoked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrustChanged:
    """node -> rank: `teacher` may teach no more, or again."""

    teacher: str
    is_trusted: bool


@dataclass(frozen=True, slots=True)
class FrameOffered:
    """node -> rank: a newer frame of a teacher is complete."""

    offer: FrameOffer


@dataclass(frozen=True, slots=True)
class FrameTaken:
    """node -> rank: the frame of that `FrameReady` is published; or, if not `accepted`, was refused: start a new chain."""

    step: int
    base_step: int | None
    accepted: bool


@dataclass(frozen=True, slots=True)
class KeyframeWanted:
    """node -> rank: a student needs a keyframe of this site's present reference."""


@dataclass(frozen=True, slots=True)
class LinksMeasured:
    """node -> rank: what the links to the students carry, in bytes a second; see `links.LinkMeter.shared_rate_bytes_s`."""

    rate_bytes_s: float


@dataclass(frozen=True, slots=True)
class StopRequested:
    """node -> rank: agree on a step, checkpoint and exit."""


RankMessage: TypeAlias = Joined | FrameReady | ReferenceReady | ChainBroken | EventHappened | Left
NodeOrder: TypeAlias = (
    FrameOffered | VersionKnown | TrustChanged | FrameTaken | KeyframeWanted | LinksMeasured | StopRequested
)
"""What the node says after its welcome."""
NodeMessage: TypeAlias = Welcome | NodeOrder
_TYPES: tuple[type[Any], ...] = (
    Joined,
    FrameReady,
    ReferenceReady,
    ChainBroken,
    EventHappened,
    Left,
    Welcome,
    FrameOffered,
    FrameTaken,
    KeyframeWanted,
    StopRequested,
    VersionKnown,
    LinksMeasured,
    TrustChanged,
)
_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "int | None": (int, type(None)),
    "bytes": (bytes,),
}


def encode_link_message(message: RankMessage | NodeMessage) -> bytes:
    """One msgpack array: the index of the type, then its fields."""
    if isinstance(message, EventHappened):  # a record is already plain data, and may nest
        fields: tuple[Any, ...] = (message.record,)
    else:
        fields = astuple(message)
    return bytes(msgpack.packb([_TYPES.index(type(message)), *fields]))


def decode_link_message(data: bytes) -> RankMessage | NodeMessage:
    """The inverse of `encode_link_message`. Raises MalformedError."""
    try:
        if len(data) > MAX_LINK_MESSAGE_BYTES:
            raise ValueError("too long")
        index, *fields = msgpack.unpackb(data)
        cls = _TYPES[index]
        if cls is Welcome:
            offers, known, revoked = fields
            return Welcome(
                tuple(_read_offer(*offer) for offer in offers),
                tuple(VersionKnown(*version) for version in known),
                tuple(map(str, revoked)),
            )
        if cls is FrameOffered:
            return FrameOffered(_read_offer(*fields[0]))
        if cls is EventHappened:
            from_record(dict(fields[0]))
        message: RankMessage | NodeMessage = cls(*fields)
        _check_types(message)
        return message
    except (ValueError, TypeError, IndexError, msgpack.UnpackException) as error:
        raise MalformedError(f"not a link message: {error}") from None


def _read_offer(
    origin: str, incarnation: int, step: int, folder: str, frames: list[tuple[int, int, str]]
) -> FrameOffer:
    if not 0 < len(frames) <= MAX_CHAIN_FRAMES:
        raise ValueError(f"a chain has 1 to {MAX_CHAIN_FRAMES} frames")
    chain = tuple((int(number), int(frame_step), str(name)) for number, frame_step, name in frames)
    return FrameOffer(origin, incarnation, step, folder, chain)


def _check_types(message: RankMessage | NodeMessage) -> None:
    """What ranks say may come from a user's own script: nothing of another type gets into the node."""
    if isinstance(message, FrameReady | ReferenceReady | ChainBroken):
        for field in dataclasses.fields(message):
            value = getattr(message, field.name)
            if type(value) not in _PLAIN_TYPES[str(field.type)]:
                raise TypeError(f"{field.name} is {value!r}, not {field.type}")
