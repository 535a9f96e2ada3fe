"""Headers: what is encoded decodes, and nothing else does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.errors import HelloMismatchError, MalformedError, RefusedError
from p2pcodistill.gossip.messages import Lane
from p2pcodistill.transport import wire

ids = st.binary(min_size=wire.ID_BYTES, max_size=wire.ID_BYTES)
greetings = st.builds(wire.Greeting, st.sampled_from(Lane), ids, ids)


@given(greetings)
def test_a_greeting_survives_the_wire(greeting: wire.Greeting) -> None:
    encoded = wire.encode_greeting(greeting)
    assert len(encoded) == wire.MAX_HEADER_BYTES
    assert wire.decode_header(encoded) == greeting


@given(st.integers(0, 2**64 - 1))
def test_a_receipt_survives_the_wire(num_bytes: int) -> None:
    encoded = wire.encode_receipt(wire.Receipt(num_bytes))
    assert wire.decode_header(encoded) == wire.Receipt(num_bytes)


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        (wire.PICK, wire.Kind.PICK),
        (wire.KEEP, wire.Kind.KEEP),
        (wire.BYE, wire.Kind.BYE),
        (wire.DATA, wire.Kind.DATA),
    ],
)
def test_the_other_headers_are_one_byte(header: bytes, kind: wire.Kind) -> None:
    assert wire.decode_header(header) is kind


@given(st.binary(max_size=wire.MAX_HEADER_BYTES + 1))
def test_whatever_decodes_is_what_would_be_encoded(header: bytes) -> None:
    try:
        decoded = wire.decode_header(header)
    except RefusedError:
        return
    if isinstance(decoded, wire.Greeting):
        assert wire.encode_greeting(decoded) == header
    elif isinstance(decoded, wire.Receipt):
        assert wire.encode_receipt(decoded) == header
    else:
        assert bytes([decoded]) == header


@given(greetings, st.integers(0, wire.MAX_HEADER_BYTES - 1), st.integers(1, 255))
def test_a_greeting_that_was_tampered_with_is_refused_or_another_greeting(
    greeting: wire.Greeting, index: int, flip: int
) -> None:
    encoded = bytearray(wire.encode_greeting(greeting))
    encoded[index] ^= flip
    try:
        assert wire.decode_header(bytes(encoded)) != greeting
    except RefusedError:
        assert index < 3


def test_another_version_is_told_from_nonsense() -> None:
    greeting = bytearray(wire.encode_greeting(wire.Greeting(Lane.BULK, b"s" * 8, b"c" * 8)))
    greeting[1] = wire.WIRE_VERSION + 1
    with pytest.raises(HelloMismatchError, match="install the same release"):
        wire.decode_header(bytes(greeting))
    for nonsense in (b"", b"\x00", b"\x01", bytes([1, wire.WIRE_VERSION]), b"\x06", wire.KEEP + b"x"):
        with pytest.raises(MalformedError):
            wire.decode_header(nonsense)
