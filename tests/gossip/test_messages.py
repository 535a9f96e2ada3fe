"""Messages survive the wire; nothing else that arrives does more than be refused."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.manifest import MAX_CHUNK_BYTES, MAX_MANIFEST_BYTES, Version
from p2pcodistill.errors import MalformedError, OversizedError
from p2pcodistill.gossip.codec import MAX_HEADER_BYTES, decode_message, encode_message
from p2pcodistill.gossip.messages import (
    MAX_HAVE_BYTES,
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
    Lane,
    Message,
    NoPath,
    Ping,
    Pong,
    Refusal,
    Unfollow,
    Want,
    lane_of,
)

FRAME_ID = "ab" * 32
RAW_ID = bytes.fromhex(FRAME_ID)

numbers = st.integers(0, 2**63 - 1)
digests = st.binary(min_size=32, max_size=32)
frame_ids = digests.map(bytes.hex)
printable = st.characters(codec="utf-8", exclude_categories=("C", "Z"))
names = st.text(printable, max_size=64)
versions = st.none() | st.builds(Version, numbers, numbers)
messages = st.one_of(
    st.builds(Hello, st.just(PROTOCOL_VERSION), names, digests, digests, numbers, numbers),
    st.builds(
        Announce,
        st.binary(max_size=300),
        st.binary(min_size=64, max_size=64),
        st.none() | st.integers(0, MAX_CHAIN_FRAMES - 1),
        st.booleans(),
    ),
    st.builds(CatchUp, versions, st.booleans(), st.none() | names),
    st.builds(NoPath, names),
    st.builds(Have, frame_ids, st.integers(0, 2**100)),
    st.builds(Follow, names, versions, numbers),
    st.builds(Unfollow, names),
    st.builds(Ping, numbers),
    st.builds(Pong, numbers),
    st.builds(
        Want, frame_ids, st.sets(numbers, min_size=1, max_size=20).map(lambda indices: tuple(sorted(indices)))
    ),
    st.builds(Chunk, frame_ids, numbers, st.binary(max_size=300)),
    st.builds(Gone, frame_ids),
    st.builds(Finished, names, numbers, st.binary(min_size=64, max_size=64)),
    st.builds(
        Refusal,
        st.text(st.sampled_from("abc-"), min_size=1, max_size=32),
        st.text(printable, max_size=MAX_WHY_CHARS),
    ),
)
# What msgpack can say beyond what messages use.
values = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | st.integers(-5, -1)
    | st.floats()
    | st.text()
    | st.binary(max_size=70),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def refused_or_message(payload: tuple[bytes, ...]) -> Message | None:
    try:
        return decode_message(payload)
    except (MalformedError, OversizedError):
        return None


@given(messages)
def test_a_message_survives_the_wire(message: Message) -> None:
    payload = encode_message(message)

    assert decode_message(payload) == message
    assert len(payload[0]) <= MAX_HEADER_BYTES
    assert len(payload) == 2 if isinstance(message, Announce | Chunk) else len(payload) == 1


def test_the_largest_messages_survive_the_wire() -> None:
    high = 2**63 - 1
    for message in (
        Want(FRAME_ID, tuple(range(high - MAX_WANT_INDICES, high))),
        Refusal("a" * 32, "\N{GRINNING FACE}" * MAX_WHY_CHARS),
        Chunk(FRAME_ID, high, bytes(MAX_CHUNK_BYTES)),
        Announce(bytes(MAX_MANIFEST_BYTES), bytes(64), MAX_CHAIN_FRAMES - 1),
        CatchUp(Version(high, high), True, "a" * 64),
        Follow("\N{GRINNING FACE}" * 64, Version(high, high), high),
        Have(FRAME_ID, 2 ** (8 * MAX_HAVE_BYTES) - 1),
    ):
        assert decode_message(encode_message(message)) == message


@given(st.lists(st.binary(max_size=200), max_size=4).map(tuple))
def test_arbitrary_bytes_are_refused_or_are_a_message(payload: tuple[bytes, ...]) -> None:
    message = refused_or_message(payload)

    assert message is None or refused_or_message(encode_message(message)) == message


@given(st.integers(0, 15), st.lists(values, max_size=7), st.lists(st.binary(max_size=20), max_size=2))
def test_arbitrary_fields_are_refused_or_are_a_message(
    code: int, fields: list[object], bulk: list[bytes]
) -> None:
    message = refused_or_message((msgpack.packb([code, *fields]), *bulk))

    assert message is None or refused_or_message(encode_message(message)) == message


@given(messages, st.data())
def test_mutated_messages_are_refused_or_are_a_message(message: Message, data: st.DataObject) -> None:
    header, *bulk = encode_message(message)
    mutated = bytearray(header)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutated)))
        mutated[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))

    decoded = refused_or_message((bytes(mutated), *bulk))

    assert decoded is None or refused_or_message(encode_message(decoded)) == decoded


def pack(*fields: object) -> bytes:
    return msgpack.packb(fields)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ((), "at least one part"),
        ((b"",), "does not parse"),
        ((b"\xc1",), "does not parse"),
        ((b"\x91" * 5000,), "does not parse"),
        ((pack(),), "type code"),
        ((pack("1"),), "type code"),
        ((pack(True),), "type code"),
        ((msgpack.packb(6),), "type code"),
        ((pack(99),), "type code 99"),
        ((pack(6) + b"x",), "does not parse"),
        ((pack(6),), "FINISHED has 3 fields, not 0"),
        ((pack(6, "berlin", 1, bytes(63)),), "signature has 64 bytes, not 63"),
        ((pack(6, None, 1, bytes(64)),), "origin's name must be of type str"),
        ((pack(5),), "GONE has 1 fields, not 0"),
        ((pack(5, RAW_ID), b"bulk"), "GONE does not come in 2 part"),
        ((pack(4, RAW_ID, 0),), "CHUNK does not come in 1 part"),
        ((pack(4, RAW_ID, 0), b"", b""), "CHUNK does not come in 3 part"),
        ((pack(4, RAW_ID, -1), b""), "between 0 and"),
        ((pack(4, RAW_ID, 2**63), b""), "between 0 and"),
        ((pack(4, RAW_ID, True), b""), "of type int"),
        ((pack(5, RAW_ID[1:]),), "32 bytes, not 31"),
        ((pack(5, FRAME_ID),), "of type bytes"),
        ((pack(3, RAW_ID, []),), "at least one"),
        ((pack(3, RAW_ID, [1, 1]),), "ascending"),
        ((pack(3, RAW_ID, [2, 1]),), "ascending"),
        ((pack(3, RAW_ID, 7),), "of type list"),
        ((pack(3, RAW_ID, list(range(MAX_WANT_INDICES + 1))),), "does not parse"),
        ((pack(2, bytes(63), None, True), b"body"), "64 bytes, not 63"),
        ((pack(2, bytes(64)), b"body"), "ANNOUNCE has 3 fields, not 1"),
        ((pack(2, bytes(64), -1, True), b"body"), "between 0 and"),
        ((pack(2, bytes(64), True, True), b"body"), "of type int"),
        ((pack(2, bytes(64), MAX_CHAIN_FRAMES, True), b"body"), "at most 64 frames"),
        ((pack(2, bytes(64), None, 1), b"body"), "of type bool"),
        ((pack(8, 1),), "CATCH_UP has 4 fields, not 1"),
        ((pack(8, 1, None, False, None),), "of type int"),
        ((pack(8, None, 1, False, None),), "of type int"),
        ((pack(8, 1, 2**63, False, None),), "between 0 and"),
        ((pack(8, False, False, False, None),), "of type int"),
        ((pack(8, None, None, 0, None),), "of type bool"),
        ((pack(8, None, None, False, 7),), "of type str"),
        ((pack(9, "ber\nlin"),), "printable"),
        ((pack(10, RAW_ID, 5),), "of type bytes"),
        ((pack(11, "berlin", 1, None, 0),), "of type int"),
        ((pack(11, "berlin", None, None, None),), "of type int"),
        ((pack(12, None),), "of type str"),
        ((pack(13, -1),), "between 0 and"),
        ((pack(14, "now"),), "of type int"),
        ((pack(7, "Bad Reason", "why"),), "not a word"),
        ((pack(7, "malformed", "\x1b[2J"),), "printable"),
        ((pack(1, PROTOCOL_VERSION, "run\n", bytes(32), bytes(32), 0, 0),), "printable"),
        ((pack(1),), "HELLO has 6 fields"),
        ((pack(1, "one"),), "of type int"),
    ],
)
def test_malformed(payload: tuple[bytes, ...], words: str) -> None:
    with pytest.raises(MalformedError, match=words):
        decode_message(payload)


@pytest.mark.parametrize(
    "payload",
    [
        (bytes(MAX_HEADER_BYTES + 1),),
        (pack(4, RAW_ID, 0), bytes(MAX_CHUNK_BYTES + 1)),
        (pack(2, bytes(64), 0, True), bytes(MAX_MANIFEST_BYTES + 1)),
        (pack(10, RAW_ID, bytes(MAX_HAVE_BYTES + 1)),),
        (pack(12, "o" * 65),),
        (pack(7, "a" * 33, "why"),),
        (pack(7, "malformed", "a" * (MAX_WHY_CHARS + 1)),),
        (pack(1, PROTOCOL_VERSION, "r" * 65, bytes(32), bytes(32), 0, 0),),
    ],
)
def test_oversized(payload: tuple[bytes, ...]) -> None:
    with pytest.raises(OversizedError, match="cap"):
        decode_message(payload)


def test_declared_sizes_allocate_nothing() -> None:
    for header in (
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
    ):
        with pytest.raises(MalformedError):
            decode_message((header,))


def test_of_another_versions_hello_only_the_version_is_decoded() -> None:
    for payload in ((pack(1, 7),), (pack(1, 7, None, 3.0), b"more")):
        hello = decode_message(payload)

        assert isinstance(hello, Hello)
        assert hello.protocol_version == 7


def test_only_chunks_are_bulk() -> None:
    assert lane_of(Chunk(FRAME_ID, 0, b"")) is Lane.BULK
    assert {
        lane_of(message)
        for message in (
            Hello(1, "run", bytes(32), bytes(32), 0, 0),
            Announce(b"", b""),
            CatchUp(None),
            NoPath("berlin"),
            Have(FRAME_ID, 1),
            Follow("berlin", None, 0),
            Unfollow("berlin"),
            Ping(1),
            Pong(1),
            Want(FRAME_ID, (0,)),
            Gone(FRAME_ID),
            Finished("berlin", 1, bytes(64)),
            Refusal("malformed", ""),
        )
    } == {Lane.CONTROL}
