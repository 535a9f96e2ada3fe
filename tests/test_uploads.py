"""Uploads: chunks are served in turn, as caps and room allow; lost frames are told, impatience and floods cost nothing."""

import asyncio
import contextlib
import os

import pytest
from patience import GENEROUS_S

from p2pcodistill.checkpoint.manifest import Manifest, Version, digest_chunks, sign_manifest
from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.gossip.codec import decode_message
from p2pcodistill.gossip.messages import Chunk, Gone, Lane
from p2pcodistill.identity import Identity
from p2pcodistill.transport.base import Opened, Received
from p2pcodistill.transport.memory import LinkConditions, MemoryNetwork, MemoryTransport
from p2pcodistill.transport.refusals import RefusalLog
from p2pcodistill.transport.shaper import UploadCaps
from p2pcodistill.uploads import MAX_REQUESTS, Uploads

BERLIN = Identity.from_secrets(b"\1" * 32, b"\2" * 32)
CHUNK = 64 << 10
NUM_CHUNKS = 300


class Site:
    """berlin, which serves one frame to oslo and lima over links in memory."""

    def __init__(self, folder, caps=None):
        self.store = FrameStore(folder / "store", site="berlin", keys={"berlin": BERLIN.public})
        data = b"".join(bytes([index % 251]) * CHUNK for index in range(NUM_CHUNKS))
        (folder / "frame").write_bytes(data)
        manifest = Manifest(
            run="run",
            origin="berlin",
            version=Version(1, 1),
            base=None,
            codec="x",
            schema_hash=b"s" * 32,
            num_fp16_bytes=1,
            num_bytes=len(data),
            chunk_bytes=CHUNK,
            chunk_digests=digest_chunks(data, CHUNK),
        )
        self.store.save_incarnation(1)
        self.frame_id = self.store.adopt(sign_manifest(manifest, BERLIN), folder / "frame").signed.frame_id
        self.network = MemoryNetwork()
        self.peers = {}
        for name in ("oslo", "lima"):
            self.network.link("berlin", name)
            self.peers[name] = MemoryTransport(self.network, name)
        self.transport = MemoryTransport(self.network, "berlin")
        self.lost, self.refusals = [], []
        self.uploads = Uploads(
            self.store, self.transport, RefusalLog(self.refusals.append, 0.0), self.lose, caps or UploadCaps()
        )

    async def lose(self, frame_id):
        self.lost.append(frame_id)

    async def open_sessions(self, *peers):
        """Receive that they have begun, as a node does: before that, nothing may be sent."""
        left = set(peers)
        async with asyncio.timeout(GENEROUS_S):
            while left:
                event = await self.transport.receive()
                if isinstance(event, Opened):
                    left.remove(event.peer)

    def want(self, peer, *indices):
        for index in indices:
            self.uploads.serve(peer, self.frame_id, index)

    async def next_message(self, peer):
        async with asyncio.timeout(GENEROUS_S):
            while not isinstance(event := await self.peers[peer].receive(), Received):
                assert isinstance(event, Opened)
        return decode_message(event.payload)

    async def chunks(self, peer, count):
        return [(await self.next_message(peer)).index for _ in range(count)]


@pytest.fixture
async def open_site(tmp_path):
    async with contextlib.AsyncExitStack() as stack:

        async def make(caps=None):
            site = Site(tmp_path, caps)
            stack.callback(site.store.close)
            for transport in (site.transport, *site.peers.values()):
                await transport.open()
                stack.push_async_callback(transport.close)
            await site.open_sessions(*site.peers)
            task = asyncio.create_task(site.uploads.run())

            async def end():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

            stack.push_async_callback(end)
            return site

        yield make


async def test_chunks_are_served_in_order(open_site):
    site = await open_site()
    site.want("oslo", 2, 5, 0)
    assert await site.chunks("oslo", 3) == [2, 5, 0]
    assert site.uploads.num_waiting_bytes("oslo") == 0


async def test_a_frame_that_is_no_longer_there_is_gone_and_told_once_a_request(open_site):
    site = await open_site()
    site.store.drop("berlin")
    site.want("oslo", 0)
    assert await site.next_message("oslo") == Gone(site.frame_id)
    assert site.lost == [site.frame_id]


async def test_a_chunk_that_is_asked_for_again_is_verified(open_site):
    site = await open_site()
    path = site.store.frames("berlin")[0].path
    changed_ns = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.write(b"?")
    os.utime(path, ns=(changed_ns, changed_ns))  # as a disk does it that nobody has written to
    site.want("oslo", 0)
    damaged = await site.next_message("oslo")
    assert damaged.index == 0 and bytes(damaged.data[:1]) == b"?"
    site.want("oslo", 0)
    assert await site.next_message("oslo") == Gone(site.frame_id)
    assert site.lost == [site.frame_id] and site.store.frames("berlin") == ()


async def test_a_peer_that_does_not_read_holds_up_nobody_and_fills_no_memory(open_site):
    site = await open_site()
    site.want("oslo", *range(NUM_CHUNKS))
    site.want("lima", *range(NUM_CHUNKS))
    assert await site.chunks("lima", NUM_CHUNKS) == list(range(NUM_CHUNKS))
    # What the transport holds for oslo, in its queue and in the inbox over there, is bounded; the rest is still on disk.
    num_bytes_held = site.transport.traffic()["oslo"].num_bytes_sent
    assert num_bytes_held < NUM_CHUNKS * CHUNK - CHUNK
    assert site.uploads.num_waiting_bytes("oslo") > 0
    assert await site.chunks("oslo", NUM_CHUNKS) == list(range(NUM_CHUNKS)), "it reads again"


async def test_a_chunk_that_waits_or_is_under_way_is_not_sent_twice(open_site):
    site = await open_site()
    site.network.link("berlin", "oslo", LinkConditions(bandwidth_bytes_s=40 * CHUNK))
    site.want("oslo", *range(4), *range(4))
    await site.next_message("oslo")
    site.want("oslo", 3, 2)  # under way
    site.want("oslo", 0, 4)  # delivered, so it was lost or damaged; and a new one
    assert await site.chunks("oslo", 5) == [1, 2, 3, 0, 4]


async def test_a_new_session_owes_nothing_to_the_last_one(open_site):
    site = await open_site()
    site.network.link("berlin", "oslo", LinkConditions(delay_s=0.02))
    site.want("oslo", *range(NUM_CHUNKS))
    await site.next_message("oslo")
    site.network.cut("berlin", "oslo")
    site.uploads.forget("oslo")
    assert site.uploads.num_waiting_bytes("oslo") == 0
    assert site.network.faults.num_payloads_cut_off > 0
    site.network.heal("berlin", "oslo")
    await site.open_sessions("oslo")
    site.want("oslo", 7)
    async with asyncio.timeout(GENEROUS_S):
        while True:
            event = await site.peers["oslo"].receive()
            if isinstance(event, Received) and decode_message(event.payload) == Chunk(
                site.frame_id, 7, bytes([7]) * CHUNK
            ):
                break


async def test_a_flood_of_wants_is_refused(open_site):
    site = await open_site()
    for index in range(MAX_REQUESTS + 3):
        site.uploads.serve("oslo", "f" * 64, index)
    assert [(r.peer, r.reason) for r in site.refusals] == [("oslo", "oversized")] * 3


async def test_a_cap_counts_control_and_shares_fairly(open_site):
    site = await open_site(UploadCaps(40.0 * CHUNK))
    loop = asyncio.get_running_loop()
    site.want("oslo", *range(NUM_CHUNKS))
    site.want("lima", *range(12))
    started_s = loop.time()
    assert site.transport.send("oslo", Lane.CONTROL, [bytes(10 * CHUNK)]), "control does not wait"
    assert await site.chunks("lima", 12) == list(range(12))
    duration_s = loop.time() - started_s
    # 12 chunks for lima, at least as many bytes for oslo, 10 chunks' worth of control among them.
    num_bytes = sum(traffic.num_bytes_sent for traffic in site.transport.traffic().values())
    assert num_bytes == pytest.approx(24 * CHUNK, abs=3 * CHUNK)
    assert num_bytes <= (duration_s + 0.25) * 40 * CHUNK + CHUNK
