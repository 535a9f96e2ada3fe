"""Messages as bytes, and back.

A message travels as a payload of one or two parts. The first is a msgpack array `[type code, fields…]` of at
most 16 KiB; the second, of `Announce` and `Chunk` only, is their bulk, so that it is never copied into or out
of a packed array.

    code  message   first part                                                              second part
    1     Hello     version, run, members digest, topology digest, incarnation, your incarnation
    2     Announce  signature, how many more of a path follow (nil: not part of one), all?   manifest
    3     Want      frame id, ascending chunk indices
    4     Chunk     frame id, chunk index                                                   the chunk
    5     Gone      frame id
    6     Finished  member, its incarnation, its signature
    7     Refusal   reason, why
    8     CatchUp   incarnation and step held (both nil: nothing), afresh, origin (nil: you)
    9     NoPath    origin
    10    Have      frame id, bitmap of chunks (the first is the lowest bit of the first byte)
    11    Follow    origin, incarnation and step held (both nil: nothing), known incarnation
    12    Unfollow  origin
    13    Ping      nonce
    14    Pong      nonce

The code and the version of a Hello keep their places in every version of the protocol, so that nodes of
different versions can tell each other what is wrong. Decoding checks caps first, then parses, then checks
every field; whether a message makes sense at this moment is for `gossip.protocol` to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack

from p2pcodistill.checkpoint.manifest import (
    DIGEST_BYTES,
    MAX_CHUNK_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_NAME_CHARS,
    Version,
)
from p2pcodistill.errors import MalformedError, OversizedError
from p2pcodistill.gossip import fields
from p2pcodistill.gossip.messages import (
    MAX_HAVE_BYTES,
    MAX_REASON_CHARS,
    MAX_WANT_INDICES,
    MAX_WHY_CHARS,
    PROTOCOL_VERSION,
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
    Payload,
    Ping,
    Pong,
    Refusal,
    Unfollow,
    Want,
)
from p2pcodistill.identity import SIGNATURE_BYTES

MAX_HEADER_BYTES = 16 << 10
_PACKER = msgpack.Packer()
_REASON = re.compile(rf"[a-z-]{{1,{MAX_REASON_CHARS}}}")


class _Code(IntEnum):
    HELLO = 1
    ANNOUNCE = 2
    WANT = 3
    CHUNK = 4
    GONE = 5
    FINISHED = 6
    REFUSAL = 7
    CATCH_UP = 8
    NO_PATH = 9
    HAVE = 10
    FOLLOW = 11
    UNFOLLOW = 12
    PING = 13
    PONG = 14


def encode_message(message: Message) -> Payload:
    """The payload of `message`, whose fields its sender vouches for: they are not checked again."""
    match message:
        case Announce(body, signature, num_more, has_all):
            return *_pack(_Code.ANNOUNCE, signature, num_more, has_all), body
        case Want(frame_id, indices):
            return _pack(_Code.WANT, bytes.fromhex(frame_id), indices)
        case Chunk(frame_id, index, data):
            return *_pack(_Code.CHUNK, bytes.fromhex(frame_id), index), data
        case Ping(nonce):
            return _pack(_Code.PING, nonce)
        case Pong(nonce):
            return _pack(_Code.PONG, nonce)
        case Hello(version, run, members, topology, incarnation, yours):
            return _pack(_Code.HELLO, version, run, members, topology, incarnation, yours)
        case Gone(frame_id):
            return _pack(_Code.GONE, bytes.fromhex(frame_id))
        case Finished(member, incarnation, signature):
            return _pack(_Code.FINISHED, member, incarnation, signature)
        case Refusal(reason, why):
            return _pack(_Code.REFUSAL, reason, why)
        case CatchUp(held, afresh, origin):
            return _pack(_Code.CATCH_UP, *_split(held), afresh, origin)
        case NoPath(origin):
            return _pack(_Code.NO_PATH, origin)
        case Have(frame_id, chunks):
            bitmap = chunks.to_bytes((chunks.bit_length() + 7) // 8, "little")
            return _pack(_Code.HAVE, bytes.fromhex(frame_id), bitmap)
        case Follow(origin, held, known_incarnation):
            return _pack(_Code.FOLLOW, origin, *_split(held), known_incarnation)
        case Unfollow(origin):
            return _pack(_Code.UNFOLLOW, origin)


def decode_message(payload: Sequence[bytes]) -> Message:
    """The message of a payload that anyone may have written.

    Raises MalformedError or OversizedError, nothing else.
    """
    if not payload:
        raise MalformedError("a message has at least one part")
    values = _unpack(payload[0])
    code = values.pop(0)
    form = _FORMS.get(code)
    if form is None:
        raise MalformedError(f"no message has the type code {code}")
    if code == _HELLO and values and values[0] != PROTOCOL_VERSION:
        # Another version may lay out the rest as it likes; the receiver only needs to say which one it is.
        version = fields.number(values[0], "protocol version")
        return Hello(version, "", bytes(DIGEST_BYTES), bytes(DIGEST_BYTES), 0, 0)
    if len(values) != form.num_fields:
        raise MalformedError(f"{form.name} has {form.num_fields} fields, not {len(values)}")
    max_bytes = form.max_bulk_bytes
    if len(payload) != (1 if max_bytes is None else 2):
        raise MalformedError(f"{form.name} does not come in {len(payload)} part(s)")
    if max_bytes is None:
        return form.decode(*values)
    if len(payload[1]) > max_bytes:
        raise OversizedError(f"{form.name} carries {len(payload[1])} bytes, over the cap of {max_bytes}")
    return form.decode(*values, payload[1])


def _split(held: Version | None) -> tuple[int | None, int | None]:
    return (held.incarnation, held.step) if held else (None, None)


def _pack(code: _Code, *values: object) -> tuple[bytes]:
    packed: bytes = _PACKER.pack((int(code), *values))
    return (packed,)


def _unpack(header: bytes) -> list[Any]:
    """The fields of a message after its type code, which is a number."""
    if len(header) > MAX_HEADER_BYTES:
        raise OversizedError(
            f"a message's first part has {len(header)} bytes, over the cap of {MAX_HEADER_BYTES}"
        )
    try:
        values = msgpack.unpackb(
            header,
            max_array_len=MAX_WANT_INDICES,
            max_bin_len=MAX_HEADER_BYTES,
            max_str_len=4 * MAX_WHY_CHARS,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise MalformedError(f"a message does not parse: {str(error) or type(error).__name__}") from None
    if type(values) is not list or not values or type(values[0]) is not int:
        raise MalformedError("a message must be an array that starts with its type code")
    return values


def _reason(value: object) -> str:
    reason = fields.text(value, MAX_REASON_CHARS, "reason")
    if not _REASON.fullmatch(reason):
        raise MalformedError("a refusal's reason is not a word")
    return reason


class _Form(NamedTuple):
    """How a message is laid out: the fields after its code, the cap of its bulk (None: it has none), and what makes it of
    all of them, in their order."""

    name: str
    num_fields: int
    max_bulk_bytes: int | None
    decode: Callable[..., Message]


_HELLO = int(_Code.HELLO)
_FORMS = {
    int(code): _Form(code.name, num_fields, max_bulk_bytes, decode)
    for code, num_fields, max_bulk_bytes, decode in (
        (
            _Code.HELLO,
            6,
            None,
            lambda version, run, members, topology, incarnation, yours: Hello(
                fields.number(version, "protocol version"),
                fields.text(run, MAX_NAME_CHARS, "run name"),
                fields.raw(members, DIGEST_BYTES, "members digest"),
                fields.raw(topology, DIGEST_BYTES, "topology digest"),
                fields.number(incarnation, "incarnation"),
                fields.number(yours, "known incarnation"),
            ),
        ),
        (
            _Code.ANNOUNCE,
            3,
            MAX_MANIFEST_BYTES,
            lambda signature, num_more, has_all, body: Announce(
                body,
                fields.raw(signature, SIGNATURE_BYTES, "signature"),
                fields.num_more(num_more),
                fields.exactly(has_all, bool, "claim to hold a frame"),
            ),
        ),
        (_Code.WANT, 2, None, lambda frame, indices: Want(fields.frame_id(frame), fields.indices(indices))),
        (
            _Code.CHUNK,
            2,
            MAX_CHUNK_BYTES,
            lambda frame, index, data: Chunk(
                fields.frame_id(frame), fields.number(index, "chunk index"), data
            ),
        ),
        (_Code.GONE, 1, None, lambda frame: Gone(fields.frame_id(frame))),
        (
            _Code.FINISHED,
            3,
            None,
            lambda member, incarnation, signature: Finished(
                fields.origin(member),
                fields.number(incarnation, "incarnation"),
                fields.raw(signature, SIGNATURE_BYTES, "signature"),
            ),
        ),
        (
            _Code.REFUSAL,
            2,
            None,
            lambda reason, why: Refusal(
                _reason(reason), fields.text(why, MAX_WHY_CHARS, "refusal's sentence")
            ),
        ),
        (
            _Code.CATCH_UP,
            4,
            None,
            lambda incarnation, step, afresh, origin: CatchUp(
                fields.held(incarnation, step),
                fields.exactly(afresh, bool, "wish for a new keyframe"),
                None if origin is None else fields.origin(origin),
            ),
        ),
        (_Code.NO_PATH, 1, None, lambda origin: NoPath(fields.origin(origin))),
        (
            _Code.HAVE,
            2,
            None,
            lambda frame, chunks: Have(fields.frame_id(frame), fields.bitmap(chunks, MAX_HAVE_BYTES)),
        ),
        (
            _Code.FOLLOW,
            4,
            None,
            lambda origin, incarnation, step, known: Follow(
                fields.origin(origin),
                fields.held(incarnation, step),
                fields.number(known, "known incarnation"),
            ),
        ),
        (_Code.UNFOLLOW, 1, None, lambda origin: Unfollow(fields.origin(origin))),
        (_Code.PING, 1, None, lambda nonce: Ping(fields.number(nonce, "nonce"))),
        (_Code.PONG, 1, None, lambda nonce: Pong(fields.number(nonce, "nonce"))),
    )
}
