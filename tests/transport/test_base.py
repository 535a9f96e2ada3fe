"""Addresses and caps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.errors import AddressError, MalformedError, OversizedError
from p2pcodistill.gossip.messages import Lane
from p2pcodistill.transport.base import (
    MAX_CONTROL_BYTES,
    MAX_PART_BYTES,
    MAX_PAYLOAD_PARTS,
    check_address,
    check_payload,
    check_sendable,
    split_address,
)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("tcp://127.0.0.1:5600", "127.0.0.1", 5600),
        ("tcp://tokyo.example:5600", "tokyo.example", 5600),
        ("tcp://node_1.site-2:65535", "node_1.site-2", 65535),
        ("tcp://[2001:db8::1]:5600", "2001:db8::1", 5600),
    ],
)
def test_addresses_that_can_be_dialled(address: str, host: str, port: int) -> None:
    assert check_address(address, listen=False) == address
    assert check_address(address, listen=True) == address
    assert split_address(address) == (host, port)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:5600", "tcp://[::]:5600", "tcp://*:5600"])
def test_every_interface_is_for_listening(address: str) -> None:
    assert check_address(address, listen=True) == address
    with pytest.raises(AddressError, match="names no machine: give the address"):
        check_address(address, listen=False)


def test_port_0_is_for_listening() -> None:
    assert check_address("tcp://127.0.0.1:0", listen=True) == "tcp://127.0.0.1:0"
    with pytest.raises(AddressError, match="give the port of the peer"):
        check_address("tcp://127.0.0.1:0", listen=False)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tokyo",
        "tokyo:5600",
        "tcp://",
        "tcp://tokyo",
        "tcp://:5600",
        "tcp://tokyo:",
        "tcp://tokyo:port",
        "tcp://tokyo:-1",
        "tcp://tokyo:65536",
        "tcp://tokyo:５６００",
        "tcp://to kyo:5600",
        "tcp://tokyo/path:5600",
        "tcp://-tokyo:5600",
        "tcp://tokyo.:5600",
        "tcp://300.1.1.1:5600",
        "tcp://1.2.3:5600",
        "tcp://2001:db8::1:5600",
        "tcp://[2001:db8::1:5600",
        "tcp://[tokyo]:5600",
        "tcp://[127.0.0.1]:5600",
        "tcp://tokyo:5600#p2p1-key",
        "tcp://a:1,tcp://b:2",
        "ipc:///tmp/socket",
        "http://tokyo:5600",
    ],
)
@pytest.mark.parametrize("listen", [True, False])
def test_what_is_no_address_says_what_one_is(address: str, listen: bool) -> None:
    with pytest.raises(AddressError, match="tcp://HOST:PORT"):
        check_address(address, listen=listen)


@given(st.text(), st.booleans())
def test_any_text_is_an_address_or_an_address_error(text: str, listen: bool) -> None:
    for candidate in (text, f"tcp://{text}", f"tcp://{text}:5600"):
        try:
            assert check_address(candidate, listen=listen) == candidate
        except AddressError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("lane", Lane)
def test_payloads_within_the_caps(lane: Lane) -> None:
    for sizes_bytes in ([0], [1] * MAX_PAYLOAD_PARTS, [MAX_CONTROL_BYTES]):
        assert check_payload(lane, sizes_bytes) is None, "refusals are raised"
    assert check_payload(Lane.BULK, [MAX_PART_BYTES] * MAX_PAYLOAD_PARTS) is None


@pytest.mark.parametrize(
    ("lane", "sizes_bytes"),
    [
        (Lane.BULK, [0] * (MAX_PAYLOAD_PARTS + 1)),
        (Lane.BULK, [1, MAX_PART_BYTES + 1]),
        (Lane.CONTROL, [MAX_CONTROL_BYTES, 1]),
    ],
)
def test_payloads_over_the_caps(lane: Lane, sizes_bytes: list[int]) -> None:
    with pytest.raises(OversizedError, match="over the cap"):
        check_payload(lane, sizes_bytes)
    with pytest.raises(ValueError, match=r"cannot send .* over the cap"):
        check_sendable(lane, [bytes(size) for size in sizes_bytes])


def test_a_payload_has_a_part() -> None:
    with pytest.raises(MalformedError):
        check_payload(Lane.CONTROL, [])
