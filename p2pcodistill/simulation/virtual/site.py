"""One site in virtual time: the production protocol over a store in memory, links in memory, and a simulated group.

`VirtualSite` stands where `node.py`, `actions.py` and `publisher.py` stand in a real site, and owes the protocol the same.
What its group does, training or a pretence of it, is behind `Ranks`. The disk takes no time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

from p2pcodistill import telemetry
from p2pcodistill.checkpoint.chain import worth_keeping
from p2pcodistill.checkpoint.manifest import (
    DEFAULT_CHUNK_BYTES,
    MAX_FRAME_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunks,
    sign_manifest,
    verify_manifest,
)
from p2pcodistill.gossip import protocol as gossip
from p2pcodistill.gossip.announce import Verify
from p2pcodistill.gossip.messages import Chunk, Gone, Lane, Payload, encode_message, lane_of
from p2pcodistill.identity import Identity, PublicIdentity
from p2pcodistill.simulation.virtual.clock import VirtualClock
from p2pcodistill.simulation.virtual.links import VirtualLink
from p2pcodistill.simulation.virtual.ranks import EncodedBytes, Ranks
from p2pcodistill.simulation.virtual.store import MemoryStore
from p2pcodistill.transport.base import Rejected
from p2pcodistill.transport.refusals import RefusalLog

TICK_S = 1.0
REFUSAL_INTERVAL_S = 1.0
TRAFFIC_INTERVAL_S = 5.0

OnEvent = Callable[[float, str, telemetry.Event], None]
"""(virtual seconds, site, event)."""


@dataclass(frozen=True)
class Surroundings:
    """What is the same for all sites of a run.

    `students_of` names the students of each member. `bytes_scale`: each byte of a frame stands for so many, on the links and
    in events. `chunk_bytes`, `window_bytes` and the sizes in manifests are real ones, before scaling. `sign` makes
    manifests, `verify` is what `Gossip` checks them with.
    """

    run: str
    clock: VirtualClock
    members: Mapping[str, PublicIdentity]
    members_digest: bytes
    topology_digest: bytes
    students_of: Mapping[str, Collection[str]]
    on_event: OnEvent
    bytes_scale: int = 1
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    window_bytes: int = gossip.DEFAULT_WINDOW_BYTES
    stall_timeout_s: float = gossip.DEFAULT_STALL_TIMEOUT_S
    ping_interval_s: float = gossip.DEFAULT_PING_INTERVAL_S
    sign: Callable[[Manifest, Identity], SignedManifest] = sign_manifest
    verify: Verify = verify_manifest
    tick_s: float = TICK_S
    traffic_interval_s: float | None = TRAFFIC_INTERVAL_S


class VirtualSite:
    """A site; an `Endpoint` of its links. It is down until `start`."""

    def __init__(
        self,
        name: str,
        identity: Identity,
        teachers: tuple[str, ...],
        students: tuple[str, ...],
        surroundings: Surroundings,
    ) -> None:
        self.name = name
        self.teachers, self.students = teachers, students
        self.store = MemoryStore(name)
        self.links: dict[str, VirtualLink] = {}
        """By peer."""
        self.ranks: Ranks | None = None
        self.num_starts = 0
        self.announced: dict[str, Version] = {}
        """The newest version that each teacher is known to have published."""
        self._identity = identity
        self._around = surroundings
        self._clock = surroundings.clock
        self._scale = surroundings.bytes_scale
        self._gossip: gossip.Gossip | None = None
        self._events: deque[gossip.Event] = deque()
        self._is_feeding = False
        self._refusals = RefusalLog(self._report_rejected, REFUSAL_INTERVAL_S)
        self._last: Version | None = None  # that this launch published
        self._traffic_s = 0.0
        self._traffic_before: dict[str, tuple[int, int]] = {}

    @property
    def is_up(self) -> bool:
        """Whether the node runs."""
        return self._gossip is not None

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the node and its group, with what the store holds. Does nothing while it runs."""
        if self._gossip is not None:
            return
        around, store = self._around, self.store
        if self.num_starts:
            store.restart()
        self.num_starts += 1
        self.announced.clear()
        self._gossip = gossip.Gossip(
            self.name,
            around.run,
            around.members,
            self.teachers,
            self.students,
            around.members_digest,
            around.topology_digest,
            store.incarnation,
            {name: chain[-1].version for name in self.teachers if (chain := store.chain(name))},
            [frame.signed for frame in store.frames(self.name)],
            store.pinned_schemas,
            max_frame_bytes=MAX_FRAME_BYTES,
            window_bytes=around.window_bytes,
            stall_timeout_s=around.stall_timeout_s,
            students_of=around.students_of,
            chains={
                origin: frames
                for origin in store.origins
                if origin != self.name
                and (frames := [f.signed for f in store.frames(origin) if not f.is_local])
            },
            ping_interval_s=around.ping_interval_s,
            verify=around.verify,
        )
        self._traffic_before = {peer: self._moved(link) for peer, link in self.links.items()}
        self._traffic_s = self._clock.now_s
        self.report(
            telemetry.NodeStarted(self.name, around.run, "virtual", store.incarnation, list(self.links), 0)
        )
        self._launch()
        for link in self.links.values():
            link.attach(self.name, self)
        self._clock.call_later(around.tick_s, self._tick, self.num_starts)

    def kill(self) -> None:
        """End node and group at once, as `kill -9` does; the store stays. Does nothing while it is down."""
        if self._gossip is not None:
            if self.ranks is not None:
                self.ranks.kill()
            self._go_down("the connection was reset")

    def leave(self) -> None:
        """Stop the group in order, and when that is done, the node. Does nothing while it is down."""
        if self._gossip is None:
            return
        if self.ranks is None:
            self._go_off(self.num_starts)
        else:
            start = self.num_starts
            self.ranks.leave(lambda: self._go_off(start))

    def end(self) -> None:
        """The run is over: say what there is to say."""
        if self._gossip is not None:
            self._say_farewell("finished")

    def _go_off(self, start: int) -> None:
        if start == self.num_starts and self._gossip is not None:
            self._say_farewell("stopped")
            self._go_down("it left")

    def _go_down(self, why: str) -> None:
        self._gossip = None
        self._events.clear()
        for link in self.links.values():
            link.detach(self.name, why)

    def _say_farewell(self, reason: str) -> None:
        self._refusals.flush(float("inf"))
        self._report_traffic()
        self.report(telemetry.NodeStopped(self.name, reason))

    def _launch(self) -> None:
        """What a node does before it launches its workers."""
        self.store.incarnation += 1
        self._last = None
        self._feed(gossip.IncarnationRaised(self.store.incarnation))
        if self.ranks is not None:
            self.ranks.launch()

    # --- what the ranks may do -----------------------------------------------------------------------------------------

    def report(self, event: telemetry.Event) -> None:
        """Add an event to this site's log, now."""
        self._around.on_event(self._clock.now_s, self.name, event)

    def publish(self, frame: EncodedBytes) -> SignedManifest:
        """Sign, store and announce a frame. A keyframe may be of the version that was published last."""
        assert frame.is_keyframe or self._last is not None, "a delta frame has a base"
        version = Version(self.store.incarnation, frame.step)
        base = None if frame.is_keyframe else self._last
        signed, chunks = self._sign(frame, self.name, version, base)
        self.store.adopt(signed, chunks)
        self._last = version
        scale = self._scale
        self.report(
            telemetry.FramePublished(
                version.incarnation,
                version.step,
                signed.manifest.kind,
                signed.num_bytes * scale,
                frame.num_fp16_bytes * scale,
            )
        )
        self._feed(gossip.FramePublished(signed))
        return signed

    def keep_keyframe(self, origin: str, version: Version, frame: EncodedBytes) -> None:
        """Keep a keyframe of a teacher's checkpoint that these ranks made, in place of the chain that led there."""
        if version in [stored.version for stored in self.store.chain(origin)]:
            self.store.adopt(*self._sign(frame, origin, version, None))

    def break_chain(self, origin: str) -> None:
        """The ranks could not apply what the store holds of `origin`."""
        self._feed(gossip.ChainBroken(origin))

    def finish(self) -> None:
        """Training is over; the node goes on serving."""
        self._feed(gossip.TrainingFinished())

    def _sign(
        self, frame: EncodedBytes, origin: str, version: Version, base: Version | None
    ) -> tuple[SignedManifest, tuple[bytes, ...]]:
        chunk_bytes, data = self._around.chunk_bytes, frame.data
        manifest = Manifest(
            run=self._around.run,
            origin=origin,
            version=version,
            base=base,
            codec=frame.codec,
            schema_hash=frame.schema_hash,
            num_fp16_bytes=frame.num_fp16_bytes,
            num_bytes=len(data),
            chunk_bytes=chunk_bytes,
            chunk_digests=digest_chunks(data, chunk_bytes),
        )
        chunks = tuple(data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes))
        return self._around.sign(manifest, self._identity), chunks

    # --- what links tell -----------------------------------------------------------------------------------------------

    def opened(self, peer: str) -> None:
        """See `links.Endpoint`."""
        self._feed(gossip.PeerOpened(peer))

    def closed(self, peer: str, why: str) -> None:
        """See `links.Endpoint`."""
        self._feed(gossip.PeerClosed(peer, why))

    def received(self, peer: str, payload: Payload) -> None:
        """See `links.Endpoint`."""
        self._feed(gossip.PayloadReceived(peer, payload))

    # --- gossip --------------------------------------------------------------------------------------------------------

    def _tick(self, start: int) -> None:
        if self._gossip is None or start != self.num_starts:
            return
        self._feed(gossip.Ticked())
        now_s, interval_s = self._clock.now_s, self._around.traffic_interval_s
        self._refusals.flush(now_s)
        if interval_s is not None and now_s - self._traffic_s >= interval_s:
            self._report_traffic()
        relayed = self._gossip.relayed_origins
        if relayed or self.store.is_prunable:
            in_use = self._gossip.frames_in_use(now_s)
            for frame_id in self.store.prune(in_use, relayed_origins=relayed):
                self._feed(gossip.FrameLost(frame_id))
        self._clock.call_later(self._around.tick_s, self._tick, start)

    def _feed(self, event: gossip.Event) -> None:
        """Hand one event to gossip and do what it decides; what follows from that comes after it."""
        self._events.append(event)
        if self._is_feeding:
            return
        self._is_feeding = True
        now_s = self._clock.now_s
        while self._events and self._gossip is not None:
            for action in self._gossip.handle(self._events.popleft(), now_s):
                self._perform(action, now_s)
        self._is_feeding = False

    def _perform(self, action: gossip.Action, now_s: float) -> None:
        if isinstance(action, gossip.SendPayload):  # by far the most
            self._send(action.peer, action.lane, action.payload)
            return
        store = self.store
        match action:
            case gossip.Report(telemetry.Refused() as refused):
                self._refusals.note(refused.peer, refused.reason, refused.why, now_s)
            case gossip.Report(event):
                if isinstance(event, telemetry.VersionAnnounced):
                    self.announced[event.origin] = Version(event.incarnation, event.step)
                self.report(self._scaled(event))
            case gossip.ServeChunk(peer, frame_id, index):
                data = store.read_chunk(frame_id, index)
                answer = Gone(frame_id) if data is None else Chunk(frame_id, index, data)
                self._send(peer, lane_of(answer), encode_message(answer))
                if data is None:
                    self._events.append(gossip.FrameLost(frame_id))
            case gossip.StoreChunk(frame_id, index, data):
                store.put_chunk(frame_id, index, data)
            case gossip.BeginFetch(signed):
                frame_id = signed.frame_id
                self._events.append(gossip.FetchBegun(frame_id, store.begin(signed, frame_id)))
            case gossip.CompleteFrame(frame_id):
                stored = store.complete(frame_id)
                chain = store.chain(stored.signed.manifest.origin)
                self._events.append(gossip.FrameStored(frame_id, chain[-1].version if chain else None))
            case gossip.OfferFrame(signed):
                if self.ranks is not None:
                    self.ranks.take_offer(signed.manifest.origin)
            case gossip.AbandonFrame(frame_id):
                store.abandon(frame_id)
            case gossip.PinSchema(origin, schema_hash):
                store.pinned_schemas[origin] = schema_hash
            case gossip.RequestKeyframe():
                if self.ranks is None or self._last is None:
                    self._events.append(gossip.KeyframeUnavailable())
                else:
                    self._clock.call_later(0.0, self._ask_for_keyframe, self.num_starts)
            case gossip.RaiseIncarnation(incarnation):
                self._renew(incarnation)
            case gossip.DropChain(origin):
                store.drop(origin)
            case _:
                assert_never(action)

    def _send(self, peer: str, lane: Lane, payload: Payload) -> None:
        scale = self._scale if lane is Lane.BULK else 1
        num_bytes = len(payload[0])
        for part in payload[1:]:
            num_bytes += len(part) * scale
        self.links[peer].send(self.name, lane, payload, num_bytes)

    def _ask_for_keyframe(self, start: int) -> None:
        if self._gossip is not None and start == self.num_starts and self.ranks is not None:
            self.ranks.make_keyframe()

    def _renew(self, incarnation: int) -> None:
        """Publish the own frames that are worth keeping again, under a higher incarnation."""
        self.store.incarnation = incarnation
        for stored in worth_keeping(self.store.frames(self.name)):
            version = Version(incarnation, stored.version.step)
            base = stored.base and Version(incarnation, stored.base.step)
            again = replace(stored.signed.manifest, version=version, base=base)
            signed = self._around.sign(again, self._identity)
            self.store.adopt(signed, stored.chunks)
            self._events.append(gossip.FramePublished(signed))
        if self._last is not None:
            self._last = Version(incarnation, self._last.step)

    # --- telemetry -----------------------------------------------------------------------------------------------------

    def _scaled(self, event: telemetry.Event) -> telemetry.Event:
        """`event` with the sizes that its frame stands for."""
        if self._scale == 1:
            return event
        match event:  # `replace` would take several times as long
            case telemetry.VersionAnnounced(origin, incarnation, step, num_bytes):
                return telemetry.VersionAnnounced(origin, incarnation, step, num_bytes * self._scale)
            case telemetry.FrameFetched(
                origin, incarnation, step, kind, num_bytes, num_resent_bytes, duration_s
            ):
                scaled = num_bytes * self._scale, num_resent_bytes * self._scale
                return telemetry.FrameFetched(origin, incarnation, step, kind, *scaled, duration_s)
        return event

    def _report_rejected(self, rejected: Rejected) -> None:
        self.report(
            telemetry.Refused(rejected.peer, rejected.reason, rejected.why, num_times=rejected.num_times)
        )

    def _report_traffic(self) -> None:
        self._traffic_s = self._clock.now_s
        sent, received = {}, {}
        for peer, link in self.links.items():
            moved, before = self._moved(link), self._traffic_before[peer]
            sent[peer], received[peer] = moved[0] - before[0], moved[1] - before[1]
        self.report(telemetry.TrafficMeasured(sum(sent.values()), sum(received.values()), sent, received))

    def _moved(self, link: VirtualLink) -> tuple[int, int]:
        """Bytes that this site has sent and received over `link`, in all its lives."""
        peer = link.peer_of(self.name)
        return link.wire_from(self.name).num_bytes_sent, link.wire_from(peer).num_bytes_arrived
