"""What two nodes say to each other. How it looks as bytes, and how large it may be, is in `codec`.

Frames are named by the SHA-256 of their manifest's body: 32 raw bytes on the wire, 64 hexadecimal digits everywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

from p2pcodistill.checkpoint.manifest import DIGEST_BYTES, MAX_MANIFEST_BYTES, Version

PROTOCOL_VERSION = 5
MAX_WANT_INDICES = 1024
MAX_HAVE_BYTES = MAX_MANIFEST_BYTES // DIGEST_BYTES // 8 + 1
"""A bit for every chunk that a manifest can name."""
MAX_REASON_CHARS = 32
MAX_WHY_CHARS = 1000


class Lane(IntEnum):
    """The two connections that a pair of peers keeps: bulk never delays control."""

    CONTROL = 0
    BULK = 1


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message of a session, from both sides: what must agree, and what is known of incarnations.

    `incarnation` is the sender's own, `known_incarnation_of_you` the highest under which it has seen the
    receiver publish (0: none). The digests are 32 bytes. Of another protocol version's Hello only the version
    is decoded.
    """

    protocol_version: int
    run: str
    members_digest: bytes
    topology_digest: bytes
    incarnation: int
    known_incarnation_of_you: int


@dataclass(frozen=True, slots=True)
class Announce:
    """The sender holds the frame of this signed manifest, whose `body` is neither verified nor parsed yet.

    The answer to a CatchUp is a *path*: one announcement for each of its frames, oldest first, of which `num_more` counts
    those that follow, down to 0. It is None in an announcement that nobody asked for.

    The sender need not be the origin, which is named inside. Unless it `has_all` of the frame, it tells by `Have` what of it
    can be asked for.
    """

    body: bytes
    signature: bytes
    num_more: int | None = None
    has_all: bool = True


@dataclass(frozen=True, slots=True)
class Want:
    """The sender asks for these chunks of a frame: 1 to 1024 indices, strictly ascending."""

    frame_id: str
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a frame, not verified yet."""

    frame_id: str
    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """The sender does not hold, or no longer holds, the frame that was wanted."""

    frame_id: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The training of `member` is over: it learns from nobody any more, unless it is launched again.

    It says so itself: `signature` (64 bytes) is its own, not verified yet, and binds the run and its `incarnation`; see
    `finishing`. A relay passes the statement on between two members that it stands between.
    """

    member: str
    incarnation: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """The sender refuses this session: `reason` is a word of `errors.RefusedError`, `why` a sentence."""

    reason: str
    why: str


@dataclass(frozen=True, slots=True)
class CatchUp:
    """The sender holds version `held` of the checkpoints of `origin` and asks for a path from there to the newest one.

    None: it holds nothing that it could go on from, and: the receiver is the origin. `afresh`: it could not apply what led
    to what it held, so that nothing but a keyframe of the newest version helps.
    """

    held: Version | None
    afresh: bool = False
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class NoPath:
    """The sender knows no path for what the receiver asked: somebody else has to. If it is the `origin`, there is nothing
    newer than what the receiver holds."""

    origin: str


@dataclass(frozen=True, slots=True)
class Have:
    """The sender holds these chunks of a frame that it is fetching, or all of them: bit i of `chunks` stands for chunk i."""

    frame_id: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Follow:
    """The sender asks to be told of the frames of `origin`, which is the receiver, or whom the receiver is asked to relay.

    `held` is the version that the sender, or who follows it in turn, would go on from (None: from nothing),
    `known_incarnation` the highest one that is known there (0: none).
    """

    origin: str
    held: Version | None
    known_incarnation: int


@dataclass(frozen=True, slots=True)
class Unfollow:
    """The end of a `Follow`: the sender needs to be told no more, or cannot tell, or not any more."""

    origin: str


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a sign of life: a `Pong` with the same nonce."""

    nonce: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to a `Ping`."""

    nonce: int


Message: TypeAlias = (
    Hello
    | Announce
    | Want
    | Chunk
    | Gone
    | Finished
    | Refusal
    | CatchUp
    | NoPath
    | Have
    | Follow
    | Unfollow
    | Ping
    | Pong
)
Payload: TypeAlias = tuple[bytes, ...]


def lane_of(message: Message) -> Lane:
    """The lane that `message` travels on: chunks are bulk, all else is control."""
    return Lane.BULK if isinstance(message, Chunk) else Lane.CONTROL
