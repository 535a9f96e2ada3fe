"""A member gone bad: speaks the protocol with tokyo's real key, and says what no honest node would."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Iterable
from unittest import mock

import torch

from p2pcodistill.checkpoint import encoder
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.manifest import Manifest, SignedManifest, Version, digest_chunks
from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot
from p2pcodistill.config import FramesConfig
from p2pcodistill.gossip.codec import decode_message, encode_message
from p2pcodistill.gossip.membership import members_digest
from p2pcodistill.gossip.messages import (
    PROTOCOL_VERSION,
    Announce,
    CatchUp,
    Chunk,
    Hello,
    Message,
    Want,
    lane_of,
)
from p2pcodistill.identity import Identity
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.recurrent import LSTMModel
from p2pcodistill.topology.build import build_topology
from p2pcodistill.transport.base import Opened, Received
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
        self.held: list[tuple[Want, int]] | None = None
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
                        if self.held is None:
                            self.serve(want, index)
                        else:
                            self.held.append((want, index))
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

    def serve_held(self) -> None:
        """Serve what was asked for while `held` was a list, and from now on at once."""
        held, self.held = self.held or [], None
        for want, index in held:
            self.serve(want, index)

    def say(self, message: Message) -> None:
        assert self.transport.send("berlin", lane_of(message), encode_message(message))

    async def flood(self, messages: Iterable[Message]) -> None:
        """Say all of that, 500 a second: what is not taken for long would end the session at this end."""
        for number, message in enumerate(messages):
            self.say(message)
            if number % 5 == 0:
                await asyncio.sleep(0.01)

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
    config = LanguageModelConfig(embedding_size=8, hidden_size=16, num_layers=1, window_tokens=16)
    return take_snapshot(LSTMModel(config), step)


def encode(snapshot: Snapshot) -> bytes:
    sink = io.BytesIO()
    FrameEncoder(FramesConfig()).encode(snapshot, sink)
    return sink.getvalue()


def encode_ruined(snapshot: Snapshot) -> bytes:
    """A frame with NaN in it, as only somebody with other code than ours would send it."""
    snapshot.tensors["readout.weight"][0, 0] = float("nan")
    with mock.patch.object(encoder, "largest_magnitude", lambda *_: 0.0):
        return encode(snapshot)
