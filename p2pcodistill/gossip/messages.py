"""What two nodes say to each other, as bytes.

A message travels as a payload of one or two parts. The first is a msgpack array `[type code, fields…]` of at
most 16 KiB; the second, of `Announce` and `Chunk` only, is their bulk, so that it is never copied into or out
of a packed array. Frames are named by the SHA-256 of their manifest's body: 32 raw bytes on the wire, 64
hexadecimal digits everywhere else.

    code  message   first part                                                              second part
    1     Hello     version, run, members digest, topology digest, incarnation, your incarnation
    2     Announce  signature, how many more of a path follow (nil: not part of one)         manifest
    3     Want      frame id, ascending chunk indices
    4     Chunk     frame id, chunk index                                                   the chunk
    5     Gone      frame id
    6     Finished
    7     Refusal   reason, why
    8     CatchUp   incarnation and step held (both nil: nothing), afresh

The code and the version of a Hello keep their places in every version of the protocol, so that nodes of
different versions can tell each other what is wrong. Decoding checks caps first, then parses, then checks
every field; whether a message makes sense at this moment is for `gossip.protocol` to say.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias, TypeVar

import msgpack

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.manifest import (
    DIGEST_BYTES,
    MAX_CHUNK_BYTES,
    MAX_COUNTER,
    MAX_MANIFEST_BYTES,
    MAX_NAME_CHARS,
    Version,
)
from p2pcodistill.errors import MalformedError, OversizedError
from p2pcodistill.identity import SIGNATURE_BYTES

PROTOCOL_VERSION = 2
MAX_HEADER_BYTES = 16 << 10
MAX_WANT_INDICES = 1024
MAX_REASON_CHARS = 32
MAX_WHY_CHARS = 1000
_REASON = re.compile(rf"[a-z-]{{1,{MAX_REASON_CHARS}}}")


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
    """

    body: bytes
    signature: bytes
    num_more: int | None = None


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
    """The sender's training is over: it learns from nobody any more."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The sender refuses this session: `reason` is a word of `errors.RefusedError`, `why` a sentence."""

    reason: str
    why: str


@dataclass(frozen=True, slots=True)
class CatchUp:
    """The sender holds version `held` of the receiver's checkpoints and asks for a path from there to the newest one.

    None: it holds nothing that it could go on from. `afresh`: it could not apply what led to what it held, so that nothing
    but a keyframe of the newest version helps.
    """

    held: Version | None
    afresh: bool = False


Message: TypeAlias = Hello | Announce | Want | Chunk | Gone | Finished | Refusal | CatchUp
Payload: TypeAlias = tuple[bytes, ...]


class _Code(IntEnum):
    HELLO = 1
    ANNOUNCE = 2
    WANT = 3
    CHUNK = 4
    GONE = 5
    FINISHED = 6
    REFUSAL = 7
    CATCH_UP = 8


_NUM_FIELDS = {
    _Code.HELLO: 6,
    _Code.ANNOUNCE: 2,
    _Code.WANT: 2,
    _Code.CHUNK: 2,
    _Code.GONE: 1,
    _Code.FINISHED: 0,
    _Code.REFUSAL: 2,
    _Code.CATCH_UP: 3,
}
_MAX_BULK_BYTES = {_Code.ANNOUNCE: MAX_MANIFEST_BYTES, _Code.CHUNK: MAX_CHUNK_BYTES}
_T = TypeVar("_T")


def lane_of(message: Message) -> Lane:
    """The lane that `message` travels on: chunks are bulk, all else is control."""
    return Lane.BULK if isinstance(message, Chunk) else Lane.CONTROL


def encode_message(message: Message) -> Payload:
    """The payload of `message`, whose fields its sender vouches for: they are not checked again."""
    match message:
        case Hello(version, run, members, topology, incarnation, yours):
            return _pack(_Code.HELLO, version, run, members, topology, incarnation, yours)
        case Announce(body, signature, num_more):
            return *_pack(_Code.ANNOUNCE, signature, num_more), body
        case Want(frame_id, indices):
            return _pack(_Code.WANT, bytes.fromhex(frame_id), indices)
        case Chunk(frame_id, index, data):
            return *_pack(_Code.CHUNK, bytes.fromhex(frame_id), index), data
        case Gone(frame_id):
            return _pack(_Code.GONE, bytes.fromhex(frame_id))
        case Finished():
            return _pack(_Code.FINISHED)
        case Refusal(reason, why):
            return _pack(_Code.REFUSAL, reason, why)
        case CatchUp(held, afresh):
            return _pack(_Code.CATCH_UP, *((held.incarnation, held.step) if held else (None, None)), afresh)


def decode_message(payload: Sequence[bytes]) -> Message:
    """The message of a payload that anyone may have written.

    Raises MalformedError or OversizedError, nothing else.
    """
    if not payload:
        raise MalformedError("a message has at least one part")
    code, fields = _unpack(payload[0])
    if code is _Code.HELLO and fields and fields[0] != PROTOCOL_VERSION:
        # Another version may lay out the rest as it likes; the receiver only needs to say which one it is.
        return Hello(
            _number(fields[0], "protocol version"), "", bytes(DIGEST_BYTES), bytes(DIGEST_BYTES), 0, 0
        )
    if len(fields) != _NUM_FIELDS[code]:
        raise MalformedError(f"{code.name} has {_NUM_FIELDS[code]} fields, not {len(fields)}")
    bulk = _bulk(code, payload[1:])
    match code:
        case _Code.HELLO:
            version, run, members, topology, incarnation, yours = fields
            return Hello(
                _number(version, "protocol version"),
                _text(run, MAX_NAME_CHARS, "run name"),
                _bytes(members, DIGEST_BYTES, "members digest"),
                _bytes(topology, DIGEST_BYTES, "topology digest"),
                _number(incarnation, "incarnation"),
                _number(yours, "known incarnation"),
            )
        case _Code.ANNOUNCE:
            return Announce(bulk, _bytes(fields[0], SIGNATURE_BYTES, "signature"), _num_more(fields[1]))
        case _Code.WANT:
            return Want(_frame_id(fields[0]), _indices(fields[1]))
        case _Code.CHUNK:
            return Chunk(_frame_id(fields[0]), _number(fields[1], "chunk index"), bulk)
        case _Code.GONE:
            return Gone(_frame_id(fields[0]))
        case _Code.FINISHED:
            return Finished()
        case _Code.REFUSAL:
            reason = _text(fields[0], MAX_REASON_CHARS, "reason")
            if not _REASON.fullmatch(reason):
                raise MalformedError("a refusal's reason is not a word")
            return Refusal(reason, _text(fields[1], MAX_WHY_CHARS, "refusal's sentence"))
        case _Code.CATCH_UP:
            incarnation, step, raw_afresh = fields
            afresh = _checked(raw_afresh, bool, "wish for a new keyframe")
            if incarnation is None and step is None:
                return CatchUp(None, afresh)
            return CatchUp(
                Version(_number(incarnation, "held incarnation"), _number(step, "held step")), afresh
            )


def _pack(code: _Code, *fields: object) -> tuple[bytes]:
    return (msgpack.packb([int(code), *fields]),)


def _unpack(header: bytes) -> tuple[_Code, list[Any]]:
    if len(header) > MAX_HEADER_BYTES:
        raise OversizedError(
            f"a message's first part has {len(header)} bytes, over the cap of {MAX_HEADER_BYTES}"
        )
    try:
        fields = msgpack.unpackb(
            header,
            max_array_len=MAX_WANT_INDICES,
            max_bin_len=SIGNATURE_BYTES,
            max_str_len=4 * MAX_WHY_CHARS,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise MalformedError(f"a message does not parse: {str(error) or type(error).__name__}") from None
    if type(fields) is not list or not fields or type(fields[0]) is not int:
        raise MalformedError("a message must be an array that starts with its type code")
    try:
        return _Code(fields[0]), fields[1:]
    except ValueError:
        raise MalformedError(f"no message has the type code {fields[0]}") from None


def _bulk(code: _Code, parts: Sequence[bytes]) -> bytes:
    max_bytes = _MAX_BULK_BYTES.get(code)
    if len(parts) != (0 if max_bytes is None else 1):
        raise MalformedError(f"{code.name} does not come in {1 + len(parts)} part(s)")
    if max_bytes is None:
        return b""
    if len(parts[0]) > max_bytes:
        raise OversizedError(f"{code.name} carries {len(parts[0])} bytes, over the cap of {max_bytes}")
    return parts[0]


def _checked(value: object, kind: type[_T], what: str) -> _T:
    if type(value) is not kind:  # exactly: a bool is an int for isinstance
        raise MalformedError(f"a {what} must be of type {kind.__name__}")
    return value


def _number(value: object, what: str) -> int:
    number = _checked(value, int, what)
    if not 0 <= number <= MAX_COUNTER:
        raise MalformedError(f"a {what} must be between 0 and {MAX_COUNTER}")
    return number


def _bytes(value: object, num_bytes: int, what: str) -> bytes:
    raw = _checked(value, bytes, what)
    if len(raw) != num_bytes:
        raise MalformedError(f"a {what} has {num_bytes} bytes, not {len(raw)}")
    return raw


def _text(value: object, max_chars: int, what: str) -> str:
    text = _checked(value, str, what)
    if len(text) > max_chars:
        raise OversizedError(f"a {what} of {len(text)} characters is over the cap of {max_chars}")
    if not text.isprintable():  # it will be shown on somebody's terminal
        raise MalformedError(f"a {what} must be printable")
    return text


def _num_more(value: object) -> int | None:
    if value is None:
        return None
    num_more = _number(value, "number of frames that follow")
    if num_more >= MAX_CHAIN_FRAMES:
        raise MalformedError(f"a path has at most {MAX_CHAIN_FRAMES} frames")
    return num_more


def _frame_id(value: object) -> str:
    return _bytes(value, DIGEST_BYTES, "frame id").hex()


def _indices(value: object) -> tuple[int, ...]:
    indices = tuple(_number(index, "chunk index") for index in _checked(value, list, "list of chunk indices"))
    if not indices or any(a >= b for a, b in itertools.pairwise(indices)):
        raise MalformedError("wanted chunk indices must be ascending, and at least one")
    return indices
