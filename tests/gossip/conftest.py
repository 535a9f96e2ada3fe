"""Members with seeded identities, frames of theirs, and a node in memory, for the tests of the gossip protocol."""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from p2pcodistill.checkpoint.chain import cheapest_path, reachable
from p2pcodistill.checkpoint.manifest import (
    MIN_CHUNK_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunk,
    digest_chunks,
    sign_manifest,
    verify_manifest,
)
from p2pcodistill.errors import SignatureError
from p2pcodistill.gossip.codec import decode_message, encode_message
from p2pcodistill.gossip.events import (
    AbandonFrame,
    Action,
    BeginFetch,
    CompleteFrame,
    DropChain,
    Event,
    FetchBegun,
    FetchRefused,
    FrameLost,
    FramePublished,
    FrameStored,
    OfferFrame,
    PayloadReceived,
    PeerClosed,
    PeerOpened,
    PinSchema,
    RaiseIncarnation,
    Report,
    RequestKeyframe,
    SendPayload,
    ServeChunk,
    StoreChunk,
    Ticked,
)
from p2pcodistill.gossip.finishing import finished_text
from p2pcodistill.gossip.membership import members_digest
from p2pcodistill.gossip.messages import (
    Chunk,
    Finished,
    Gone,
    Message,
    Want,
    lane_of,
)
from p2pcodistill.gossip.protocol import Gossip
from p2pcodistill.identity import Identity, PublicIdentity
from p2pcodistill.telemetry import node_events
from p2pcodistill.telemetry.event import Event as TelemetryEvent

RUN = "run"
MAX_FRAME_BYTES = 1 << 20
MEMBERS = ("berlin", "tokyo", "lima", "oslo")


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
        return self.signed.version

    @property
    def base(self) -> Version | None:
        return self.signed.base

    @property
    def num_bytes(self) -> int:
        return self.signed.num_bytes


class Sites:
    """Four members with identities, who publish whatever a test asks for."""

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
        base: Version | int | None = None,
        num_fp16_bytes: int | None = None,
    ) -> Frame:
        """A frame that `origin` (or, falsely, `signer`) signed; `content` tells frames of one version apart.

        It is a keyframe, or a delta frame on top of `base`, which is a step of the same incarnation or a version.
        """
        seed = f"{origin} {incarnation} {step} {base} {content}".encode()
        blocks = [hashlib.sha256(seed + index.to_bytes(4, "big")).digest() for index in range(num_chunks)]
        data = b"".join(block * (chunk_bytes // 32) for block in blocks[:-1]) + blocks[-1] * 32
        data = data[: (num_chunks - 1) * chunk_bytes + 1000]
        manifest = Manifest(
            run=run,
            origin=origin,
            version=Version(incarnation, step),
            base=Version(incarnation, base) if isinstance(base, int) else base,
            codec="test",
            schema_hash=hashlib.sha256(schema.encode()).digest(),
            num_fp16_bytes=2 * len(data) if num_fp16_bytes is None else num_fp16_bytes,
            num_bytes=len(data),
            chunk_bytes=chunk_bytes,
            chunk_digests=digest_chunks(data, chunk_bytes),
        )
        chunks = tuple(data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes))
        return Frame(sign_manifest(manifest, self.identities[signer or origin]), chunks)

    def chain(self, origin: str, last_step: int, *, num_chunks: int = 2) -> list[Frame]:
        """A keyframe of step 0, of 9 chunks, and a delta frame of `num_chunks` for each step up to `last_step`."""
        deltas = [
            self.frame(
                origin, step, base=step - 1, num_chunks=num_chunks, num_fp16_bytes=10 * MIN_CHUNK_BYTES
            )
            for step in range(1, last_step + 1)
        ]
        return [self.frame(origin, 0, num_chunks=9, num_fp16_bytes=10 * MIN_CHUNK_BYTES), *deltas]

    def finished(
        self, member: str, *, incarnation: int = 0, run: str = RUN, signer: str | None = None
    ) -> Finished:
        """That the training of `member` is over, as it (or, falsely, `signer`) signed it."""
        text = finished_text(run, member, incarnation)
        return Finished(member, incarnation, self.identities[signer or member].sign(text))

    def net(self, *nodes: Node, apart: Sequence[tuple[str, str]] = ()) -> Net:
        """The nodes, connected but for the pairs that are `apart`."""
        return Net(*nodes, apart=apart)

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

    def frames_of(self, origin: str) -> list[Frame]:
        """The complete frames of an origin, by version, of one version the delta frame first."""
        frames = [frame for frame in self.frames.values() if frame.signed.manifest.origin == origin]
        return sorted(frames, key=lambda frame: (frame.version, frame.base is None, frame.frame_id))

    def chain(self, origin: str) -> list[Frame]:
        """The cheapest path from nothing to the highest version that can be reached."""
        frames = self.frames_of(origin)
        return cheapest_path(frames, None, reachable(frames)) or []

    @staticmethod
    def is_of_origin(frame: Frame, sites: Sites) -> bool:
        """Whether its origin signed it: it is no local keyframe."""
        signed = frame.signed
        try:
            verify_manifest(signed.body, signed.signature, sites.members[signed.manifest.origin])
        except SignatureError:
            return False
        return True

    def held(self, origin: str) -> Version | None:
        """Where the chain leads to."""
        chain = self.chain(origin)
        return chain[-1].version if chain else None


class Node:
    """Carries out actions as the node does, over a store in memory, and checks what the protocol owes it.

    `sent` holds what is to be delivered, `events` what was reported, `offered` what the group was handed, `refuses` a
    reason for the store to refuse whatever is to be fetched. A keyframe that the protocol requests is made by the test,
    unless `obliging_ranks` do it at once.
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
        obliging_ranks: bool = False,
        **changes: Any,
    ) -> None:
        self.sites = sites
        self.name = name
        self.teachers = tuple(teachers)
        self.store = Store() if store is None else store
        self.window_bytes = window_bytes
        self.now_s = 0.0
        self.sent: deque[SendPayload] = deque()
        self.events: list[TelemetryEvent] = []
        self.offered: list[SignedManifest] = []
        self.num_chunks_served = 0
        self.num_keyframes_requested = 0
        self.is_keyframe_wanted = False
        self.obliging_ranks = obliging_ranks
        self.refuses: str | None = None
        self._reached: dict[str, Version] = {}
        settings: dict[str, Any] = {
            "site": name,
            "run": RUN,
            "members": sites.members,
            "teachers": teachers,
            "students": students,
            "members_digest": members_digest(sites.members),
            "topology_digest": bytes(32),
            "incarnation": self.store.incarnation,
            "held": {teacher: held for teacher in teachers if (held := self.store.held(teacher))},
            "own_frames": [frame.signed for frame in self.store.frames_of(name)],
            "pinned_schemas": dict(self.store.pins),
            "chains": {
                origin: [frame.signed for frame in frames if self.store.is_of_origin(frame, sites)]
                for origin in sites.members
                if origin != name and (frames := self.store.frames_of(origin))
            },
            "max_frame_bytes": MAX_FRAME_BYTES,
            "sign": sites.identities[name].sign,
            "window_bytes": window_bytes,
            "ping_interval_s": float("inf"),
        }
        self.gossip = Gossip(**(settings | changes))

    def publish(self, frame: Frame) -> list[Action]:
        """Adopt a frame of this site."""
        self.store.frames[frame.frame_id] = frame
        return self.feed(FramePublished(frame.signed))

    def keyframe_of(self, origin: str, *, num_chunks: int = 9) -> Frame:
        """A keyframe of the newest version of `origin` in the store."""
        newest = self.store.frames_of(origin)[-1]
        return self.sites.frame(
            origin,
            newest.version.step,
            incarnation=newest.version.incarnation,
            num_chunks=num_chunks,
            content="made later",
            num_fp16_bytes=newest.signed.manifest.num_fp16_bytes,
        )

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
                events += self._perform(action)
        return done

    def prune(self) -> None:
        """Drop what the protocol does not need, and partial frames that were superseded while nobody was there."""
        store, in_use = self.store, self.gossip.frames_in_use(self.now_s)
        members = self.sites.members
        held = {origin: store.held(origin) for origin in members}
        kept = {
            frame.frame_id for origin in members if origin in self.teachers for frame in store.chain(origin)
        } | in_use
        for frame_id, frame in list(store.frames.items()):
            origin = frame.signed.manifest.origin
            reached = held[origin]
            is_ahead = origin in self.teachers and (reached is None or frame.version > reached)
            if frame_id not in kept and not is_ahead:
                del store.frames[frame_id]
                if origin != self.name:
                    self.feed(FrameLost(frame_id))
        for frame_id, (signed, _) in list(store.partials.items()):
            reached = held[signed.manifest.origin]
            if frame_id not in in_use and reached is not None and reached >= signed.version:
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
            if isinstance(event, node_events.VersionAnnounced)
        ]

    def refusals(self) -> list[tuple[str | None, str]]:
        """(peer, reason) of every refusal reported so far."""
        return [(event.peer, event.reason) for event in self.events if isinstance(event, node_events.Refused)]

    def _send(self, peer: str, message: Message) -> None:
        self.sent.append(SendPayload(peer, lane_of(message), encode_message(message)))

    def _perform(self, action: Action) -> list[Event]:
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
                if self.refuses is not None:
                    return [FetchRefused(signed.frame_id, self.refuses, "no room")]
                if signed.frame_id in store.frames:
                    return [FetchBegun(signed.frame_id, frozenset(range(signed.manifest.num_chunks)))]
                _, present = store.partials.setdefault(signed.frame_id, (signed, {}))
                return [FetchBegun(signed.frame_id, frozenset(present))]
            case StoreChunk(frame_id, index, data):
                signed, present = store.partials[frame_id]
                assert index not in present
                assert digest_chunk(data) == signed.manifest.chunk_digests[index]
                present[index] = data
            case CompleteFrame(frame_id):
                if frame_id not in store.frames:
                    signed, present = store.partials.pop(frame_id)
                    assert len(present) == signed.manifest.num_chunks
                    store.frames[frame_id] = Frame(signed, tuple(present[i] for i in range(len(present))))
                return [FrameStored(frame_id, store.held(store.frames[frame_id].signed.manifest.origin))]
            case AbandonFrame(frame_id):
                store.partials.pop(frame_id, None)
            case ServeChunk(peer, frame_id, index):
                if frame_id in store.frames:
                    self.num_chunks_served += 1
                    self._send(peer, Chunk(frame_id, index, store.frames[frame_id].chunks[index]))
                elif index in store.partials.get(frame_id, (None, {}))[1]:
                    self.num_chunks_served += 1
                    self._send(peer, Chunk(frame_id, index, store.partials[frame_id][1][index]))
                else:
                    self._send(peer, Gone(frame_id))
                    return [FrameLost(frame_id)]
            case PinSchema(origin, schema_hash):
                assert store.pins.get(origin) != schema_hash
                store.pins[origin] = schema_hash
            case RaiseIncarnation(incarnation):
                assert incarnation > store.incarnation
                store.incarnation = incarnation
                return self._publish_again()
            case RequestKeyframe():
                self.num_keyframes_requested += 1
                self.is_keyframe_wanted = True
                if self.obliging_ranks:
                    frame = self.keyframe_of(self.name)
                    store.frames[frame.frame_id] = frame
                    self.is_keyframe_wanted = False
                    return [FramePublished(frame.signed)]
            case DropChain(origin):
                for frame in store.frames_of(origin):
                    del store.frames[frame.frame_id]
                self._reached.pop(origin, None)
            case OfferFrame(signed):
                self._check_offer(signed)
                self.offered.append(signed)
            case Report(event):
                self.events.append(event)
        return []

    def _publish_again(self) -> list[Event]:
        renewed: list[Event] = []
        in_use = self.gossip.frames_in_use(self.now_s)
        for frame in self.store.frames_of(self.name):
            if frame.frame_id not in in_use:
                continue
            base = frame.base and Version(self.store.incarnation, frame.base.step)
            version = Version(self.store.incarnation, frame.version.step)
            manifest = replace(frame.signed.manifest, version=version, base=base)
            signed = sign_manifest(manifest, self.sites.identities[self.name])
            self.store.frames[signed.frame_id] = Frame(signed, frame.chunks)
            renewed.append(FramePublished(signed))
        return renewed

    def _check_offer(self, signed: SignedManifest) -> None:
        manifest = signed.manifest
        assert verify_manifest(signed.body, signed.signature, self.sites.members[manifest.origin]) == signed
        assert self.store.frames[signed.frame_id].signed == signed
        held, before = self.store.held(manifest.origin), self._reached.get(manifest.origin)
        assert held is not None and held >= signed.version
        assert before is None or before < held
        self._reached[manifest.origin] = held


class Net:
    """Nodes that are all connected unless they are `cut`: messages are delivered in turns, one of each link at a time."""

    def __init__(self, *nodes: Node, apart: Sequence[tuple[str, str]] = ()) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.queues: dict[tuple[str, str], deque[SendPayload]] = {}
        self.history: defaultdict[tuple[str, str], list[Message]] = defaultdict(list)
        for a in self.nodes:
            for b in self.nodes:
                if a < b and (a, b) not in apart and (b, a) not in apart:
                    self.connect(a, b)

    def connect(self, a: str, b: str) -> None:
        self.queues[a, b], self.queues[b, a] = deque(), deque()
        self.nodes[a].feed(PeerOpened(b))
        self.nodes[b].feed(PeerOpened(a))

    def cut(self, a: str, b: str) -> None:
        del self.queues[a, b], self.queues[b, a]
        self.nodes[a].feed(PeerClosed(b, "cut"))
        self.nodes[b].feed(PeerClosed(a, "cut"))

    def turn(self) -> bool:
        """Every link delivers one payload; whether there were any."""
        for node in self.nodes.values():
            while node.sent:
                action = node.sent.popleft()
                if (node.name, action.peer) in self.queues:
                    self.queues[node.name, action.peer].append(action)
        busy = [link for link, queue in self.queues.items() if queue]
        for link in busy:
            if queue := self.queues.get(link):
                payload = queue.popleft().payload
                self.history[link].append(decode_message(payload))
                self.nodes[link[1]].feed(PayloadReceived(link[0], payload))
        return bool(busy)

    def settle(self) -> None:
        """Deliver until nothing is under way."""
        for _ in range(10_000):
            if not self.turn():
                return
        raise AssertionError("they do not come to rest")

    def wait(self, seconds: float) -> None:
        """Time passes for all."""
        for node in self.nodes.values():
            node.now_s += seconds
            node.feed(Ticked())
        self.settle()


@pytest.fixture(scope="session")
def sites() -> Sites:
    return Sites()
