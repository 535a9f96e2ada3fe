"""What libzmq has to be told, and what it tells: sockets with every bound it knows, monitors, addresses."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, cast

import zmq
import zmq.asyncio
from zmq.utils import z85

from p2pcodistill.errors import AddressError
from p2pcodistill.identity import Identity
from p2pcodistill.transport.base import MAX_PART_BYTES, is_ip_literal, split_address

MAX_QUEUED_SENDS = 256
"""Messages that libzmq holds for a connection that does not take them. What has no receipt is bounded in bytes, far below;
a member that sends receipts for what it has not taken can fill this with the largest chunks, 1 GiB."""
MAX_QUEUED_RECEIVES = 16
MAX_BURST = 16
MAX_BURST_BYTES = 1 << 20
"""What is read in one go, in messages and in bytes: what is on other sockets, control perhaps, wants its turn."""
_CURVE_OVERHEAD_BYTES = 64


@dataclass(frozen=True, slots=True)
class Timing:
    """When to say something, and when to give up."""

    keep_alive_s: float = 2.0
    silence_timeout_s: float = 10.0
    min_redial_s: float = 0.1
    max_redial_s: float = 5.0
    refusal_interval_s: float = 1.0
    flush_s: float = 0.25


class Route(NamedTuple):
    """How to reach one connection: a socket, and on a ROUTER the routing id that messages start with."""

    socket: zmq.asyncio.Socket
    prefix: tuple[bytes, ...] = ()


def make_socket(
    resources: ExitStack,
    context: zmq.asyncio.Context,
    kind: int,
    identity: Identity,
    timing: Timing,
    address: str,
) -> zmq.asyncio.Socket:
    """A socket for `address` with our key, bounded in memory and in time; `resources` closes it."""
    made = resources.enter_context(context.socket(kind))
    made.curve_secretkey = z85.encode(identity.curve_secret)
    made.curve_publickey = z85.encode(identity.public.curve_key)
    made.maxmsgsize = MAX_PART_BYTES + _CURVE_OVERHEAD_BYTES
    made.sndhwm = MAX_QUEUED_SENDS
    made.rcvhwm = MAX_QUEUED_RECEIVES
    made.linger = round(1000 * timing.flush_s)
    made.ipv6 = "[" in address
    made.handshake_ivl = round(1000 * timing.silence_timeout_s)
    made.tcp_keepalive = 1
    made.tcp_keepalive_idle = 15  # short enough for a NAT on the way to remember an idle bulk lane
    made.tcp_keepalive_intvl = 5
    made.tcp_keepalive_cnt = 3
    # Of TCP rather than ZMTP heartbeats, which take one large payload on a thin link for silence.
    made.tcp_maxrt = round(1000 * timing.silence_timeout_s)
    return made


def monitor_socket(resources: ExitStack, watched: zmq.asyncio.Socket, events: int) -> zmq.asyncio.Socket:
    """A socket that receives `events` of `watched`; `resources` ends it, which must be before `watched` is closed."""
    monitor = watched.get_monitor_socket(events)
    resources.callback(monitor.close)
    resources.callback(watched.disable_monitor)  # first: events for which nobody is there would block libzmq
    return monitor


def open_zap(resources: ExitStack, context: zmq.asyncio.Context) -> zmq.asyncio.Socket:
    """The socket on which libzmq asks about each new connection of `context`; `resources` closes it."""
    zap = resources.enter_context(context.socket(zmq.REP))
    zap.linger = 0
    zap.bind("inproc://zeromq.zap.01")
    return zap


async def answer_zap(zap: zmq.asyncio.Socket, request_id: bytes, user_id: bytes | None) -> None:
    """Admit a connection as `user_id`, or refuse it (None)."""
    verdict = [b"200", b"OK", user_id] if user_id else [b"400", b"unknown key", b""]
    await zap.send_multipart([b"1.0", request_id, *verdict, b""])


def send_now(route: Route, frames: Sequence[bytes]) -> int | None:
    """Queue one message without waiting. Returns None, or EAGAIN (queue full) or EHOSTUNREACH (connection gone)."""
    try:
        # A future that is done: with DONTWAIT pyzmq answers at once.
        # Small parts are copied all the same; of a large one libzmq holds what it is given until it is sent.
        sent = route.socket.send_multipart([*route.prefix, *frames], flags=zmq.DONTWAIT, copy=False)
        cast("asyncio.Future[None]", sent).result()
    except zmq.ZMQError as error:
        if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
            raise
        return error.errno
    return None


def has_arrivals(source: zmq.asyncio.Socket) -> bool:
    """Whether there is a message to receive."""
    return bool(cast(int, source.get(zmq.EVENTS)) & zmq.POLLIN)


def receive_now(source: zmq.asyncio.Socket) -> Iterator[list[zmq.Frame]]:
    """The messages that have arrived by now, or the first of them."""
    num_bytes = 0
    for _ in range(MAX_BURST):
        received = cast("asyncio.Future[list[zmq.Frame]]", source.recv_multipart(zmq.DONTWAIT, copy=False))
        try:
            frames = received.result()
        except zmq.Again:
            return
        yield frames
        num_bytes += sum(map(len, frames))
        if num_bytes >= MAX_BURST_BYTES:
            return


async def resolve_address(address: str, attempt: int) -> str | None:
    """An address for libzmq with the host as a number; None when the name does not resolve now.

    libzmq would look the name up on its I/O thread, and only ever try the first result; attempts take turns here.
    """
    host, port = split_address(address)
    if not is_ip_literal(host):
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            return None
        host = str(found[attempt % len(found)][4][0])
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def bind_socket(bound: zmq.asyncio.Socket, address: str) -> str:
    """Listen on `address`; returns it with the real port. Raises AddressError, which says what to do."""
    try:
        bound.bind(address)
    except zmq.ZMQError as error:
        match error.errno:
            case errno.EADDRINUSE:
                remedy = "the port is in use: stop the program that listens there, or choose another port"
            case errno.EADDRNOTAVAIL | errno.ENODEV:
                host, port = split_address(address)
                remedy = f"{host!r} is no address of this machine: use one that is, or tcp://0.0.0.0:{port} for all"
            case errno.EACCES:
                remedy = "not permitted: choose a port above 1023"
            case _:
                remedy = error.strerror
        raise AddressError(f"cannot listen on {address}: {remedy}") from None
    return cast(bytes, bound.last_endpoint).decode()
