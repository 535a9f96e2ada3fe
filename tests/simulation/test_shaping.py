"""The shaping relay over real TCP: rate, delay, order, losses, cuts, darkness, and how little it buffers."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from patience import GENEROUS_S

from p2pcodistill.simulation.link_config import LinkConfig
from p2pcodistill.simulation.shaping import Direction, LinkShape, ShapedLink
from p2pcodistill.strict import parse_model

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Dial = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def acknowledge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the end of the stream with its digest."""
    digest = hashlib.sha256()
    while data := await reader.read(1 << 16):
        digest.update(data)
    writer.write(digest.digest())


@asynccontextmanager
async def shaped(
    shape: LinkShape, handler: Handler = echo, *, seed: int = 0
) -> AsyncIterator[tuple[ShapedLink, Dial]]:
    """A link in front of a server, and a way to dial it; all that was dialled is closed in the end."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(ConnectionError):
            await handler(reader, writer)
            writer.write_eof()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    link = ShapedLink(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", shape, seed=seed)
    host, port = (await link.open()).removeprefix("tcp://").split(":")

    async def dial() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        return reader, writer

    try:
        async with asyncio.timeout(GENEROUS_S):
            yield link, dial
    finally:
        for writer in writers:
            writer.close()
        await link.close()
        server.close()
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


async def send(dial: Dial, content: bytes) -> bytes:
    """Send `content` and its end; what came back until the end."""
    reader, writer = await dial()
    writer.write(content)
    await writer.drain()
    writer.write_eof()
    return await reader.read()


async def ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    """The seconds that a byte needs there and back."""
    begun_s = time.monotonic()
    writer.write(b"p")
    assert await reader.readexactly(1) == b"p"
    return time.monotonic() - begun_s


async def first_within(limit_s: float, measure: Callable[[], Awaitable[float]]) -> float:
    """The first of many measurements that is below the limit: other work on the machine delays some of them, not all."""
    measured_s = []
    for _ in range(30):
        measured_s.append(await measure())
        if measured_s[-1] < limit_s:
            return measured_s[-1]
    raise AssertionError(f"never below {limit_s} s: {measured_s}")


async def test_a_perfect_link_changes_nothing() -> None:
    content = random.Random(1).randbytes(3_000_000)
    async with shaped(LinkShape(), acknowledge) as (link, dial):
        assert await send(dial, content) == hashlib.sha256(content).digest()
        assert link.num_bytes_forwarded == len(content) + 32
        assert link.num_cuts == 0


async def test_all_connections_share_the_bandwidth_fairly() -> None:
    num_bytes = 250_000
    contents = [random.Random(index).randbytes(num_bytes) for index in range(2)]
    async with shaped(LinkShape(bandwidth_mbit=8.0), acknowledge) as (link, dial):
        num_bytes_when_over: list[int] = []

        async def transfer(content: bytes) -> bytes:
            digest = await send(dial, content)
            num_bytes_when_over.append(link.num_bytes_forwarded)
            return digest

        async def transfer_both() -> float:
            num_bytes_when_over.clear()
            num_bytes_before, begun_s = link.num_bytes_forwarded, time.monotonic()
            digests = await asyncio.gather(*map(transfer, contents))
            taken_s = time.monotonic() - begun_s
            assert digests == [hashlib.sha256(content).digest() for content in contents]
            first, both = (num_bytes - num_bytes_before for num_bytes in num_bytes_when_over)
            assert both < 1.03e6 * taken_s
            assert first > 0.7 * both, "one after the other, half had arrived when the first one was over"
            return taken_s

        await first_within(2 * len(contents) * num_bytes / 1e6, transfer_both)


async def test_a_far_link_delays_and_stays_full() -> None:
    shape = LinkShape(bandwidth_mbit=16.0, latency_ms=50.0)
    content = bytes(1_000_000)
    async with shaped(shape) as (link, dial):
        ends = await dial()
        assert await first_within(0.3, lambda: ping(*ends)) >= 0.1
    async with shaped(shape, acknowledge) as (link, dial):

        async def transfer() -> float:
            num_bytes_before, begun_s = link.num_bytes_forwarded, time.monotonic()
            await send(dial, content)
            taken_s = time.monotonic() - begun_s
            assert link.num_bytes_forwarded - num_bytes_before == len(content) + 32
            return taken_s

        # A handshake, half a second of bytes, and a round trip: a link that waited for acknowledgements would need more.
        assert await first_within(1.4, transfer) > 0.69


async def test_jitter_and_losses_delay_but_keep_the_order_and_depend_on_the_seed() -> None:
    content = random.Random(2).randbytes(200_000)
    shape = LinkShape(bandwidth_mbit=80.0, latency_ms=1.0, jitter_ms=20.0, loss_ratio=0.2)
    async with shaped(shape, acknowledge) as (_, dial):
        assert await send(dial, content) == hashlib.sha256(content).digest()

    def arrivals(seed: int) -> list[float]:
        direction = Direction(shape, random.Random(seed))
        return [direction.put(1460, 0.0) for _ in range(200)]

    assert arrivals(1) == arrivals(1) != arrivals(2)
    # Every lost packet is sent again: a fifth more for the first time, a fifth of these for the second, and so on.
    on_the_wire_s = 200 * 1460 / 10e6 / (1 - 0.2)
    assert arrivals(1)[-1] == pytest.approx(on_the_wire_s, rel=0.25, abs=0.1)
    assert sum(arrival > 0.0224 + on_the_wire_s for arrival in arrivals(1)) > 10


async def test_little_is_buffered_and_the_sender_is_pushed_back() -> None:
    shape = LinkShape(bandwidth_mbit=1.0, latency_ms=100.0)
    assert shape.buffer_bytes == 25_000

    async def never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with shaped(shape, never_read) as (_, dial):
        _, writer = await dial()
        end = writer.get_extra_info("socket")
        with socket.socket(fileno=socket.dup(end.fileno())) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 10)
            num_sent, begun_s = 0, time.monotonic()
            while (elapsed_s := time.monotonic() - begun_s) < 1.0 or num_sent <= 25_000:
                with suppress(BlockingIOError):
                    num_sent += raw.send(bytes(4096))
                await asyncio.sleep(0.01)
        # What the link has carried, one bandwidth-delay product, and the small buffers of the kernel on both of its sides.
        assert num_sent < elapsed_s * 125_000 + shape.buffer_bytes + 100_000


async def test_a_cut_is_a_reset_at_both_ends_and_a_new_connection_works() -> None:
    seen: list[str] = []
    over = asyncio.Event()

    async def watch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await echo(reader, writer)
        except ConnectionResetError:
            seen.append("reset")
            over.set()

    async with shaped(LinkShape(), watch) as (link, dial):
        reader, writer = await dial()
        await ping(reader, writer)
        link.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await over.wait()
        assert (seen, link.num_cuts) == (["reset"], 1)
        await ping(*await dial())


async def test_what_was_on_its_way_arrives_before_the_reset_of_its_sender() -> None:
    async def last_words(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(b"last words")
        await writer.drain()
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async with shaped(LinkShape(latency_ms=50.0), last_words) as (link, dial):
        reader, writer = await dial()
        writer.write(b"p")
        assert await reader.readexactly(10) == b"last words"
        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert link.num_cuts == 0, "it was none of the link's doing"


async def test_resets_come_at_their_interval() -> None:
    async with shaped(LinkShape(reset_interval_s=0.1)) as (link, dial):
        for _ in range(3):
            reader, _ = await dial()
            with pytest.raises(ConnectionResetError):
                await reader.read()
        assert link.num_cuts == 3


async def test_a_partition_resets_what_is_there_and_what_comes_until_it_heals() -> None:
    async with shaped(LinkShape()) as (link, dial):
        reader, writer = await dial()
        await ping(reader, writer)
        link.block()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        with pytest.raises(ConnectionError):
            late_reader, _ = await dial()
            await late_reader.read()
        link.unblock()
        await ping(*await dial())


async def test_a_dark_link_swallows_what_is_sent_and_goes_on_where_it_was() -> None:
    async with shaped(LinkShape()) as (link, dial):
        reader, writer = await dial()
        await ping(reader, writer)
        link.black_hole(True)
        writer.write(b"into the dark")
        while not link.num_swallowed:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert link.num_bytes_forwarded == 2
        link.black_hole(False)
        assert await reader.readexactly(13) == b"into the dark"
        assert (link.num_cuts, link.num_swallowed) == (0, 1)


async def test_a_target_that_does_not_listen_resets_the_connection_and_closing_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    link = ShapedLink(f"tcp://127.0.0.1:{port}", LinkShape())
    host, own_port = (await link.open()).removeprefix("tcp://").split(":")
    reader, writer = await asyncio.open_connection(host, int(own_port))
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    before = asyncio.all_tasks()
    await link.close()
    await link.close()
    assert asyncio.all_tasks() < before
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(own_port))


def test_the_shape_of_a_scenarios_link() -> None:
    table = {"between": ["berlin", "tokyo"], "bandwidth_mbit": 20, "latency_ms": 100, "reset_interval_s": 30}
    shape = LinkShape.from_config(parse_model(LinkConfig, table, source="test"))
    assert shape == LinkShape(bandwidth_mbit=20.0, latency_ms=100.0, reset_interval_s=30.0)
    assert (shape.round_trip_s, shape.buffer_bytes) == (0.2, 500_000)
