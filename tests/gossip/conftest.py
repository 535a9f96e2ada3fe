"""Members with seeded identities, frames of theirs, and a node in memory, for the tests of the gossip protocol."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from p2pcodistill import telemetry
from p2pcodistill.checkpoint.manifest import (
    MIN_CHUNK_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunks,
    sign_manifest,
    verify_manifest,
)
from p2pcodistill.gossip.messages import Chunk, Gone, Message, Want, decode_message, encode_message, lane_of
from p2pcodistill.gossip.protocol import (
    AbandonFrame,
    Action,
    BeginFetch,
    CompleteFrame,
    Event,
    FetchBegun,
    FramePublished,
    FrameStored,
    Gossip,
    OfferFrame,
    PayloadReceived,
    PinSchema,
    RaiseIncarnation,
    Report,
    SendPayload,
    ServeChunk,
    StoreChunk,
    members_digest,
)
from p2pcodistill.identity import Identity, PublicIdentity

RUN = "run"
MAX_FRAME_BYTES = 1 << 20
MEMBERS = ("berlin", "tokyo", "lima")


@dataclass(frozen=True)
class Frame:
    """A signed manifest and the chunks that it describes, 16 KiB each but for the last, of 1000 bytes."""

    signed: SignedManifest
    chunks: tuple[bytes, ...]

    @property
    def frame_id(self) -> str:
        return self.signed.frame_id

    @property
    def version(self) -> Version:
        return self.signed.manifest.version


class Sites:
    """Three members with identities, who publish whatever a test asks for."""

    def __init__(self) -> None:
        self.identities = {name: self._identity(name) for name in (*MEMBERS, "stranger")}
        self.members: Mapping[str, PublicIdentity] = {name: self.identities[name].public for name in MEMBERS}

    def frame(
        self,
        origin: str,
        step: int,
        *,
        incarnation: int = 1,
        num_chunks: int = 3,
        run: str = RUN,
        schema: str = "schema",
        content: str = "",
        chunk_bytes: int = MIN_CHUNK_BYTES,
        signer: str | None = None,
    ) -> Frame:
        """A frame that `origin` (or, falsely, `signer`) signed; `content` tells frames of one version apart."""
        seed = f"{origin} {incarnation} {step} {content}".encode()
        blocks = [hashlib.sha256(seed + index.to_bytes(4, "big")).digest() for index in range(num_chunks)]
        data = b"".join(block * (chunk_bytes // 32) for block in blocks[:-1]) + blocks[-1] * 32
        data = data[: (num_chunks - 1) * chunk_bytes + 1000]
        manifest = Manifest(
            run=run,
            origin=origin,
            version=Version(incarnation, step),
            kind="keyframe",
            codec="test",
            schema_hash=hashlib.sha256(schema.encode()).digest(),
            num_fp16_bytes=2 * len(data),
            num_bytes=len(data),
            chunk_bytes=chunk_bytes,
            chunk_digests=digest_chunks(data, chunk_bytes),
        )
        chunks = tuple(data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes))
        return Frame(sign_manifest(manifest, self.identities[signer or origin]), chunks)

    def node(self, name: str, **settings: Any) -> Node:
        """The node of a member; `settings` as of `Node`."""
        return Node(self, name, **settings)

    @staticmethod
    def _identity(name: str) -> Identity:
        secrets = [hashlib.sha256(f"{name} {use}".encode()).digest() for use in ("sign", "curve")]
        return Identity.from_secrets(*secrets)


@dataclass
class Store:
    """What survives a restart."""

    incarnation: int = 0
    pins: dict[str, bytes] = field(default_factory=dict)
    frames: dict[str, Frame] = field(default_factory=dict)
    partials: dict[str, tuple[SignedManifest, dict[int, bytes]]] = field(default_factory=dict)

    def newest(self) -> dict[str, Frame]:
        """The newest complete frame of each origin."""
        newest: dict[str, Frame] = {}
        for frame in self.frames.values():
            origin = frame.signed.manifest.origin
            if origin not in newest or frame.version > newest[origin].version:
                newest[origin] = frame
        return newest


class Node:
    """Carries out actions as the node does, over a store in memory, and checks what the protocol owes it.

    `sent` holds what is to be delivered, `events` what was reported, `offered` what the group was handed.
    """

    def __init__(
        self,
        sites: Sites,
        name: str,
        *,
        teachers: Sequence[str] = (),
        students: Sequence[str] = (),
        store: Store | None = None,
        window_bytes: int = 4 * MIN_CHUNK_BYTES,
        **changes: Any,
    ) -> None:
        self.sites = sites
        self.name = name
        self.store = Store() if store is None else store
        self.window_bytes = window_bytes
        self.now_s = 0.0
        self.sent: deque[SendPayload] = deque()
        self.events: list[telemetry.Event] = []
        self.offered: list[SignedManifest] = []
        self.num_chunks_served = 0
        settings: dict[str, Any] = {
            "site": name,
            "run": RUN,
            "members": sites.members,
            "teachers": teachers,
            "students": students,
            "members_digest": members_digest(sites.members),
            "topology_digest": bytes(32),
            "incarnation": self.store.incarnation,
            "stored": {origin: frame.signed for origin, frame in self.store.newest().items()},
            "pinned_schemas": dict(self.store.pins),
            "max_frame_bytes": MAX_FRAME_BYTES,
            "window_bytes": window_bytes,
        }
        self.gossip = Gossip(**(settings | changes))

    def publish(self, frame: Frame) -> list[Action]:
        """Adopt a frame of this site."""
        self.store.frames[frame.frame_id] = frame
        return self.feed(FramePublished(frame.signed))

    def receive(self, peer: str, message: Message) -> list[Action]:
        """`peer` sent `message`."""
        return self.feed(PayloadReceived(peer, encode_message(message)))

    def feed(self, event: Event) -> list[Action]:
        """Hand over an event and do what follows; all the actions, in order."""
        done: list[Action] = []
        events = deque([event])
        while events:
            for action in self.gossip.handle(events.popleft(), self.now_s):
                done.append(action)
                follow_up = self._perform(action)
                if follow_up is not None:
                    events.append(follow_up)
            for credit_bytes in self.gossip.credit_bytes.values():
                assert 0 <= credit_bytes <= self.window_bytes
        return done

    def prune(self) -> None:
        """Drop what the protocol does not need, and partial frames that were superseded while nobody was there."""
        store, newest, in_use = self.store, self.store.newest(), self.gossip.frames_in_use(self.now_s)
        kept = {frame.frame_id for frame in newest.values()} | in_use
        store.frames = {frame_id: frame for frame_id, frame in store.frames.items() if frame_id in kept}
        for frame_id, (signed, _) in list(store.partials.items()):
            superseding = newest.get(signed.manifest.origin)
            if frame_id not in in_use and superseding and superseding.version >= signed.manifest.version:
                del store.partials[frame_id]

    def take_messages(self) -> list[tuple[str, Message]]:
        """What was sent since the last time, decoded, as (peer, message)."""
        messages = [(action.peer, decode_message(action.payload)) for action in self.sent]
        self.sent.clear()
        return messages

    def versions_announced(self) -> list[tuple[str, Version]]:
        """(origin, version) of every announcement that was accepted as new."""
        return [
            (event.origin, Version(event.incarnation, event.step))
            for event in self.events
            if isinstance(event, telemetry.VersionAnnounced)
        ]

    def refusals(self) -> list[tuple[str | None, str]]:
        """(peer, reason) of every refusal reported so far."""
        return [(event.peer, event.reason) for event in self.events if isinstance(event, telemetry.Refused)]

    def _send(self, peer: str, message: Message) -> None:
        self.sent.append(SendPayload(peer, lane_of(message), encode_message(message)))

    def _perform(self, action: Action) -> Event | None:
        store = self.store
        match action:
            case SendPayload(payload=payload):
                message = decode_message(payload)
                if isinstance(message, Want):
                    manifest = store.partials[message.frame_id][0].manifest
                    num_bytes = sum(manifest.chunk_range(index)[1] for index in message.indices)
                    assert num_bytes <= self.window_bytes
                self.sent.append(action)
            case BeginFetch(signed):
                _, present = store.partials.setdefault(signed.frame_id, (signed, {}))
                return FetchBegun(signed.frame_id, frozenset(present))
            case StoreChunk(frame_id, index, data):
                signed, present = store.partials[frame_id]
                assert index not in present
                assert hashlib.sha256(data).digest() == signed.manifest.chunk_digests[index]
                present[index] = data
            case CompleteFrame(frame_id):
                signed, present = store.partials.pop(frame_id)
                assert len(present) == signed.manifest.num_chunks
                store.frames[frame_id] = Frame(signed, tuple(present[i] for i in range(len(present))))
                return FrameStored(frame_id)
            case AbandonFrame(frame_id):
                del store.partials[frame_id]
            case ServeChunk(peer, frame_id, index):
                if frame_id in store.frames:
                    self.num_chunks_served += 1
                    self._send(peer, Chunk(frame_id, index, store.frames[frame_id].chunks[index]))
                else:
                    self._send(peer, Gone(frame_id))
            case PinSchema(origin, schema_hash):
                assert store.pins.get(origin) != schema_hash
                store.pins[origin] = schema_hash
            case RaiseIncarnation(incarnation):
                assert incarnation > store.incarnation
                store.incarnation = incarnation
                return self._publish_again()
            case OfferFrame(signed):
                self._check_offer(signed)
                self.offered.append(signed)
            case Report(event):
                self.events.append(event)
        return None

    def _publish_again(self) -> Event | None:
        newest = self.store.newest().get(self.name)
        if newest is None:
            return None
        manifest = newest.signed.manifest
        version = Version(self.store.incarnation, manifest.version.step)
        signed = sign_manifest(replace(manifest, version=version), self.sites.identities[self.name])
        self.store.frames[signed.frame_id] = Frame(signed, newest.chunks)
        return FramePublished(signed)

    def _check_offer(self, signed: SignedManifest) -> None:
        manifest = signed.manifest
        assert verify_manifest(signed.body, signed.signature, self.sites.members[manifest.origin]) == signed
        assert self.store.frames[signed.frame_id].signed == signed
        for earlier in self.offered:
            assert earlier.manifest.origin != manifest.origin or earlier.manifest.version < manifest.version


@pytest.fixture(scope="session")
def sites() -> Sites:
    return Sites()
