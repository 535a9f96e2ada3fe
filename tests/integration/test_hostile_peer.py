"""A member gone bad, against a real node that trains: everything wrong is refused, counted and shown, and nothing stops."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from p2pcodistill.checkpoint import encoder
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.manifest import Manifest, SignedManifest, Version, digest_chunks, sign_manifest
from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot
from p2pcodistill.config import FramesConfig, LanguageModelConfig
from p2pcodistill.gossip.membership import members_digest
from p2pcodistill.gossip.messages import (
    PROTOCOL_VERSION,
    Announce,
    CatchUp,
    Chunk,
    Hello,
    Lane,
    Message,
    Want,
    decode_message,
    encode_message,
    lane_of,
)
from p2pcodistill.identity import Identity
from p2pcodistill.tasks.language_model import ByteLSTM
from p2pcodistill.topology import build_topology
from p2pcodistill.transport.base import Closed, Opened, Received, Rejected
from p2pcodistill.transport.zeromq import PeerEndpoint, ZeroMQTransport

CHUNK_BYTES = 16 * 1024


class HostileTokyo:
    """Speaks the protocol with tokyo's real key, and says what no honest node would."""

    def __init__(self, berlin, tokyo, identity: Identity | None = None) -> None:
        keys = {site.name: site.identity.public for site in (berlin, tokyo)}
        self.identity = identity or tokyo.identity
        self.hello = Hello(
            PROTOCOL_VERSION, "test", members_digest(keys), build_topology("pair", tuple(keys)).digest, 1, 0
        )
        endpoint = PeerEndpoint(berlin.identity.public, f"tcp://127.0.0.1:{berlin.port}")
        self.transport = ZeroMQTransport(self.identity, "tcp://127.0.0.1:0", {"berlin": endpoint})
        self.frame = b""
        self.serving: asyncio.Task[object] | None = None
        self.corrupt_chunks = 0
        self.num_chunks_served = 0
        self.asked: asyncio.Queue[CatchUp] = asyncio.Queue()

    async def greet(self) -> None:
        """Wait for the session and say hello in it."""
        await self.next(Opened)
        self.say(self.hello)

    async def next(self, kind: type):
        """The next event of that kind, serving berlin's wants and noting what else it asks for meanwhile."""
        while True:
            event = await self.transport.receive()
            match decode_message(event.payload) if isinstance(event, Received) else None:
                case Want() as want:
                    for index in want.indices:
                        self.serve(want, index)
                case CatchUp() as request:
                    self.asked.put_nowait(request)
            if isinstance(event, kind):
                return event

    def serve(self, want: Want, index: int) -> None:
        data = self.frame[index * CHUNK_BYTES :][:CHUNK_BYTES]
        if self.corrupt_chunks:
            self.corrupt_chunks -= 1
            data = bytes(len(data))
        self.num_chunks_served += 1
        self.say(Chunk(want.frame_id, index, data))

    def say(self, message: Message) -> None:
        assert self.transport.send("berlin", lane_of(message), encode_message(message))

    def manifest(self, step: int, schema_hash: bytes, base: Version | None = None) -> Manifest:
        return Manifest(
            run="test",
            origin="tokyo",
            version=Version(1, step),
            base=base,
            codec="fp16+blosc2",
            schema_hash=schema_hash,
            num_fp16_bytes=len(self.frame),
            num_bytes=len(self.frame),
            chunk_bytes=CHUNK_BYTES,
            chunk_digests=digest_chunks(self.frame, CHUNK_BYTES),
        )

    def announce(self, signed: SignedManifest, num_more: int | None = None) -> None:
        self.say(Announce(signed.body, signed.signature, num_more))


@contextlib.asynccontextmanager
async def hostile(tokyo: HostileTokyo) -> AsyncIterator[HostileTokyo]:
    """An open transport, closed at the end."""
    await tokyo.transport.open()
    try:
        yield tokyo
    finally:
        if tokyo.serving is not None:
            tokyo.serving.cancel()
        await tokyo.transport.close()


def snapshot_of_tiny_model(step: int) -> Snapshot:
    torch.manual_seed(7)
    config = LanguageModelConfig(embedding_size=8, hidden_size=16, num_layers=1, window_bytes=16)
    return take_snapshot(ByteLSTM(config), step)


def encode(snapshot: Snapshot) -> bytes:
    sink = io.BytesIO()
    FrameEncoder(FramesConfig()).encode(snapshot, sink)
    return sink.getvalue()


def encode_ruined(snapshot: Snapshot) -> bytes:
    """A frame with NaN in it, as only somebody with other code than ours would send it."""
    snapshot.tensors["readout.weight"][0, 0] = float("nan")
    with mock.patch.object(encoder, "largest_magnitude", lambda *_: 0.0):
        return encode(snapshot)


@pytest.fixture
async def berlin_and_tokyo(sites):
    berlin, tokyo = sites.make("berlin", "tokyo", training={"num_steps": 10_000_000})
    await berlin.start()
    await berlin.until("training-started")
    return berlin, tokyo


async def refusal(berlin, reason: str, *words: str, event: str = "refused"):
    record = await berlin.until(
        event, lambda r: r["reason"] == reason and all(word in r["why"] for word in words)
    )
    return record


async def test_everything_wrong_from_a_member_is_refused_and_a_good_checkpoint_still_teaches(
    berlin_and_tokyo,
):
    berlin, tokyo_site = berlin_and_tokyo
    snapshot = snapshot_of_tiny_model(10)
    async with hostile(HostileTokyo(berlin, tokyo_site)) as tokyo:
        await tokyo.greet()
        await berlin.until("peer-connected")
        tokyo.serving = asyncio.create_task(tokyo.next(Closed))

        tokyo.transport.send("berlin", Lane.CONTROL, [b"\xc1"])
        await refusal(berlin, "malformed")
        tokyo.transport.send("berlin", Lane.CONTROL, [bytes(1 << 20)])
        await refusal(berlin, "oversized")

        tokyo.frame = encode(snapshot)
        manifest = tokyo.manifest(10, snapshot.schema_hash)
        tokyo.announce(sign_manifest(manifest, Identity.generate()))
        await refusal(berlin, "bad-signature")
        tokyo.announce(sign_manifest(replace(manifest, origin="berlin"), tokyo.identity))
        await refusal(berlin, "bad-signature", "in the name of 'berlin'")
        tokyo.announce(sign_manifest(replace(manifest, run="yesterday"), tokyo.identity))
        await refusal(berlin, "replayed", "yesterday")

        tokyo.corrupt_chunks = 1
        tokyo.announce(sign_manifest(manifest, tokyo.identity))
        await refusal(berlin, "bad-checksum")
        assert tokyo.corrupt_chunks == 0
        await berlin.until("teacher-swapped", lambda r: r["teacher_step"] == 10)

        tokyo.announce(sign_manifest(replace(manifest, version=Version(1, 9)), tokyo.identity))
        await refusal(berlin, "replayed", "step 9", "after step 10")
        tokyo.announce(sign_manifest(replace(manifest, num_fp16_bytes=1), tokyo.identity))
        await refusal(berlin, "replayed", "two different")
        tokyo.announce(sign_manifest(tokyo.manifest(11, bytes(32)), tokyo.identity))
        await refusal(berlin, "wrong-schema")

        tokyo.frame = encode_ruined(snapshot_of_tiny_model(20))
        tokyo.announce(sign_manifest(tokyo.manifest(20, snapshot.schema_hash), tokyo.identity))
        await refusal(berlin, "non-finite", "readout.weight", event="teacher-refused")

        assert await asyncio.wait_for(tokyo.asked.get(), 30) == CatchUp(None, afresh=True), (
            "berlin has nothing to build on"
        )

        good = snapshot_of_tiny_model(30)
        tokyo.frame = encode(good)
        tokyo.announce(sign_manifest(tokyo.manifest(30, good.schema_hash), tokyo.identity))
        swap = await berlin.until("teacher-swapped", lambda r: r["teacher_step"] == 30)
        await berlin.until("step-measured", lambda r: r["step"] > swap["step"])
        assert tokyo.num_chunks_served >= 4
    assert not berlin.all("node-stopped") and not berlin.all("group-exited")


async def test_chains_that_lead_nowhere_are_refused_or_replaced(berlin_and_tokyo):
    berlin, tokyo_site = berlin_and_tokyo
    async with hostile(HostileTokyo(berlin, tokyo_site)) as tokyo:
        await tokyo.greet()
        await berlin.until("peer-connected")
        tokyo.serving = asyncio.create_task(tokyo.next(Closed))
        snapshot = snapshot_of_tiny_model(10)
        schema_hash = snapshot.schema_hash

        def signed(step: int, base_step: int | None) -> SignedManifest:
            base = None if base_step is None else Version(1, base_step)
            return sign_manifest(tokyo.manifest(step, schema_hash, base), tokyo.identity)

        # A delta frame on nothing that berlin has: it asks for a path, and one with a gap is no path.
        tokyo.frame = encode(snapshot)
        tokyo.announce(signed(9, 8))
        assert await asyncio.wait_for(tokyo.asked.get(), 30) == CatchUp(None)
        tokyo.announce(signed(9, 8), num_more=0)
        await refusal(berlin, "malformed", "path")
        tokyo.announce(signed(10, None))
        await berlin.until("teacher-swapped", lambda r: r["teacher_step"] == 10)

        # A delta frame that is something else: the ranks refuse it, and the chain is given up.
        tokyo.announce(signed(20, 10))
        await refusal(berlin, "malformed", "step 20", event="teacher-refused")
        assert await asyncio.wait_for(tokyo.asked.get(), 30) == CatchUp(None, afresh=True)
        tokyo.frame = encode(snapshot_of_tiny_model(30))
        tokyo.announce(signed(30, None))
        await berlin.until("teacher-swapped", lambda r: r["teacher_step"] == 30)
    assert not berlin.all("node-stopped") and not berlin.all("group-exited")


async def test_a_site_that_means_another_run_is_refused_by_name_on_both_sides(berlin_and_tokyo):
    berlin, tokyo_site = berlin_and_tokyo
    tokyo = HostileTokyo(berlin, tokyo_site)
    tokyo.hello = replace(tokyo.hello, topology_digest=bytes(32))
    async with hostile(tokyo):
        await tokyo.greet()
        record = await refusal(berlin, "hello-mismatch", "topology")
        assert record["peer"] == "tokyo"
    assert not berlin.all("peer-connected")


async def test_a_stranger_never_gets_a_message_through(berlin_and_tokyo):
    berlin, tokyo_site = berlin_and_tokyo
    async with hostile(HostileTokyo(berlin, tokyo_site, Identity.generate())) as stranger:
        record = await refusal(berlin, "unknown-peer", "not on this site's list")
        assert record["peer"] is None
        rejected = await stranger.next(Rejected)
        assert rejected.reason == "unknown-peer" and "does not know our key" in rejected.why
    assert not berlin.all("peer-connected")
