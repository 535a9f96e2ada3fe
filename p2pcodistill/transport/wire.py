"""What ZeroMQ transports say to each other beneath the payloads: one header, the first part of every message.

GREET   0x01, version, lane, session id (8 bytes), channel id (8 bytes)      first on every lane, answered in kind
PICK    0x02                 from the side that leads: the session runs on this channel
KEEP    0x03                 both sides, on every lane, every `keep_alive_s`
BYE     0x04                 this channel is out of use; also the answer to whatever comes on such a channel
DATA    0x05, then 1 to 4 parts: a payload
RECEIPT 0x06, bytes of bulk payloads received on this channel so far (8 bytes)       on the control lane
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from p2pcodistill.errors import HelloMismatchError, MalformedError
from p2pcodistill.gossip.messages import Lane

WIRE_VERSION = 2
ID_BYTES = 8
_RECEIPT = struct.Struct(">BQ")
_GREETING = struct.Struct(f">BBB{ID_BYTES}s{ID_BYTES}s")


class Kind(IntEnum):
    """The first byte of a header."""

    GREET = 1
    PICK = 2
    KEEP = 3
    BYE = 4
    DATA = 5
    RECEIPT = 6


_BARE_KINDS = (Kind.PICK, Kind.KEEP, Kind.BYE, Kind.DATA)
PICK, KEEP, BYE, DATA = (bytes([kind]) for kind in _BARE_KINDS)
MAX_HEADER_BYTES = _GREETING.size


@dataclass(frozen=True, slots=True)
class Greeting:
    """This connection is `lane` of the channel `channel_id`; the process that speaks is `session`. Ids are 8 bytes."""

    lane: Lane
    session: bytes
    channel_id: bytes


@dataclass(frozen=True, slots=True)
class Receipt:
    """The sender of this has received so many bytes of bulk payloads on this channel."""

    num_bytes: int


def encode_receipt(receipt: Receipt) -> bytes:
    """The header of a receipt. Raises struct.error for more than 8 bytes hold."""
    return _RECEIPT.pack(Kind.RECEIPT, receipt.num_bytes)


def encode_greeting(greeting: Greeting) -> bytes:
    """The header of a greeting."""
    return _GREETING.pack(Kind.GREET, WIRE_VERSION, greeting.lane, greeting.session, greeting.channel_id)


def decode_header(header: bytes) -> Kind | Greeting | Receipt:
    """What a header says that anyone may have written.

    Raises MalformedError, and HelloMismatchError for a greeting of another version.
    """
    if header[:1] == bytes([Kind.RECEIPT]) and len(header) == _RECEIPT.size:
        return Receipt(_RECEIPT.unpack(header)[1])
    if header[:1] != bytes([Kind.GREET]):
        if len(header) != 1 or header[0] not in _BARE_KINDS:
            raise MalformedError("a message of no known kind")
        return Kind(header[0])
    if header[1:2] != bytes([WIRE_VERSION]) and len(header) > 1:
        raise HelloMismatchError(
            f"a greeting in version {header[1]} of the transport, not {WIRE_VERSION}: "
            "install the same release of p2pcodistill on both sites"
        )
    if len(header) != _GREETING.size or header[2] not in Lane.__members__.values():
        raise MalformedError("a greeting that does not parse")
    _, _, lane, session, channel_id = _GREETING.unpack(header)
    return Greeting(Lane(lane), session, channel_id)
