"""The seam where bytes leave the process: what a transport owes the node, and what it may not be handed.

A *session* with a peer lasts from one `Opened` to the next `Closed`. The node relies on this, for every implementation:

- `peer` is the member whose key was authenticated, never a name that somebody declared.
- Both sides see the same sessions. Within one, the control payloads of each side arrive all and in order, or the session
  ends; bulk payloads arrive in order, but may be lost. What was not received by `Closed` is lost.
- Bulk never delays control: a lane each, and `receive` hands out whatever is control first.
- What is sent belongs to the session whose `Opened` was received last; if that is over, it goes nowhere.
- A peer's fault (an oversized payload, a message that does not parse, a key nobody knows) is a `Rejected` event, and all
  else goes on. Only a fault of this transport itself is raised, from `receive`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from p2pcodistill.errors import AddressError, MalformedError, OversizedError, RefusedError
from p2pcodistill.gossip.messages import Lane

MAX_PAYLOAD_PARTS = 4
MAX_PART_BYTES = 5 << 20
"""Above the largest chunk (4 MiB) and the largest manifest (a little over 2 MiB)."""
MAX_CONTROL_BYTES = 4 << 20
"""Of a whole control payload: what may stand before a control message that is in a hurry."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A session with `peer` has begun: both lanes are there."""

    peer: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The session with `peer` is over; the transport keeps trying to open another."""

    peer: str
    why: str


@dataclass(frozen=True, slots=True)
class Received:
    """`peer` sent `payload` within the current session."""

    peer: str
    lane: Lane
    payload: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """Something from outside was refused. `reason` is a word of `errors.RefusedError`, `why` the sentence.

    `peer` is None for somebody who is no member. One event may stand for `num_times` alike, so that a flood of them
    costs little; no refusal goes uncounted.
    """

    peer: str | None
    reason: str
    why: str
    num_times: int = 1


TransportEvent: TypeAlias = Opened | Closed | Received | Rejected


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes handed to and received from one peer's connections since the transport was made, envelopes included.

    `num_bytes_under_way` of bulk payloads were sent in this session and have not been received yet. What that shows of the
    way to the peer, where it is measured: the rate at which it takes bulk, lately and at best, and the round trip.
    """

    num_bytes_sent: int
    num_bytes_received: int
    num_bytes_under_way: int = 0
    rate_bytes_s: float | None = None
    round_trip_s: float | None = None


class Transport(Protocol):
    """Moves payloads (tuples of bytes) between members. Used from one asyncio task at a time, opened and closed once."""

    async def open(self) -> None:
        """Listen and begin to connect. Raises AddressError, which says what to change, when listening is impossible."""

    async def receive(self) -> TransportEvent:
        """The next event. Raises what broke inside the transport, and RuntimeError once it is closed."""

    def send(self, peer: str, lane: Lane, payload: Sequence[bytes]) -> bool:
        """Queue `payload` for `peer`; never blocks.

        False when there is no session or no room in the queue, which is bounded for each peer: in bytes, if it is honest
        about what it has received, else in payloads. A control payload for which there is no room ends the session, because
        the peer would miss it without knowing. Raises KeyError when `peer` is none of this transport's peers and ValueError
        when `payload` is over the caps.
        """

    def traffic(self) -> Mapping[str, Traffic]:
        """The bytes moved so far, for every peer."""

    async def close(self) -> None:
        """End every session and leave nothing behind; calling it again does nothing.

        Control payloads that were queued get a moment to leave, bulk is given up.
        """


def check_payload(lane: Lane, part_sizes_bytes: Sequence[int]) -> None:
    """Raise MalformedError or OversizedError unless a payload with parts of these sizes may travel on `lane`."""
    if not part_sizes_bytes:
        raise MalformedError("a payload has at least one part")
    if len(part_sizes_bytes) > MAX_PAYLOAD_PARTS:
        raise OversizedError(
            f"a payload of {len(part_sizes_bytes)} parts is over the cap of {MAX_PAYLOAD_PARTS}"
        )
    largest_bytes, total_bytes = max(part_sizes_bytes), sum(part_sizes_bytes)
    if largest_bytes > MAX_PART_BYTES:
        raise OversizedError(f"a part of {largest_bytes} bytes is over the cap of {MAX_PART_BYTES}")
    if lane is Lane.CONTROL and total_bytes > MAX_CONTROL_BYTES:
        raise OversizedError(
            f"a control payload of {total_bytes} bytes is over the cap of {MAX_CONTROL_BYTES}"
        )


def check_sendable(lane: Lane, payload: Sequence[bytes]) -> None:
    """Raise ValueError unless `payload` may be sent on `lane`: over the caps it is a mistake of the caller's."""
    try:
        check_payload(lane, [len(part) for part in payload])
    except RefusedError as error:
        raise ValueError(f"cannot send {error}") from None


_HOST_NAME = re.compile(
    r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
)
_SHAPE = "an address has the form tcp://HOST:PORT, with an IPv6 host in brackets"


def check_address(text: str, *, listen: bool) -> str:
    """Return `text` if it is an address to listen on or to dial, else raise AddressError, which says what to do.

    Port 0 (any free port) and hosts that mean every interface (`0.0.0.0`, `[::]`, `*`) are for listening only.
    """
    host, port = split_address(text)
    if host == "*" or (is_ip_literal(host) and ipaddress.ip_address(host).is_unspecified):
        if not listen:
            raise AddressError(
                f"{text!r} names no machine: give the address at which the peer can be reached"
            )
    elif not is_ip_literal(host) and (not _HOST_NAME.fullmatch(host) or host.rpartition(".")[2].isdigit()):
        raise AddressError(f"{host!r} in {text!r} is neither a host name nor an IP address: {_SHAPE}")
    if port == 0 and not listen:
        raise AddressError(f"{text!r} has port 0, which nobody listens on: give the port of the peer")
    return text


def split_address(text: str) -> tuple[str, int]:
    """The host (an IPv6 one without its brackets) and the port of a `tcp://` address. Raises AddressError."""
    scheme, separator, rest = text.partition("://")
    if separator and scheme != "tcp":
        raise AddressError(f"{text!r} is a {scheme} address, but sites connect over TCP: {_SHAPE}")
    host, colon, port = rest.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not separator or not colon or not host or (":" in host and not bracketed):
        raise AddressError(f"{text!r} does not parse: {_SHAPE}")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise AddressError(f"{text!r} has no port between 0 and 65535: {_SHAPE}")
    host = host[1:-1] if bracketed else host
    if bracketed and not (is_ip_literal(host) and ":" in host):
        raise AddressError(f"{host!r} in {text!r} is not an IPv6 address: {_SHAPE}")
    return host, int(port)


def is_ip_literal(host: str) -> bool:
    """Whether `host` (without brackets) is an IPv4 or IPv6 address rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
