"""One site in virtual time: the production protocol over a store in memory, links in memory, and a simulated group.

`VirtualSite` stands where `node.py`, `actions.py` and `publisher.py` stand in a real site, and owes the protocol the same.
What its group does, training or a pretence of it, is behind `Ranks`. The disk takes no time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import assert_never

from p2pcodistill.checkpoint.chain import worth_keeping
from p2pcodistill.checkpoint.manifest import (
    MAX_FRAME_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunks,
)
from p2pcodistill.errors import OversizedError
from p2pcodistill.gossip import events as gossip
from p2pcodistill.gossip.codec import encode_message
from p2pcodistill.gossip.messages import Chunk, Gone, Lane, Payload
from p2pcodistill.gossip.protocol import Gossip
from p2pcodistill.identity import Identity
from p2pcodistill.simulation.virtual.links import VirtualLink
from p2pcodistill.simulation.virtual.ranks import EncodedBytes, Ranks
from p2pcodistill.simulation.virtual.store import MemoryStore
from p2pcodistill.simulation.virtual.surroundings import Surroundings
from p2pcodistill.simulation.virtual.traffic import SiteTraffic, scaled
from p2pcodistill.simulation.virtual.uploads import CappedUploads
from p2pcodistill.telemetry import node_events
from p2pcodistill.telemetry.event import Event as TelemetryEvent
from p2pcodistill.transport.base import Rejected
from p2pcodistill.transport.refusals import RefusalLog
from p2pcodistill.transport.shaper import UploadCaps

REFUSAL_INTERVAL_S = 1.0


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
        self._gossip: Gossip | None = None
        self._events: deque[gossip.Event] = deque()
        self._is_feeding = False
        self._refusals = RefusalLog(self._report_rejected, REFUSAL_INTERVAL_S)
        self._last: Version | None = None  # that this launch published
        self._caps = surroundings.caps.get(name, UploadCaps())
        self._uploads: CappedUploads | None = None
        self._traffic = SiteTraffic(
            name, self.links, students, self._caps, chunk_bytes=surroundings.chunk_bytes
        )

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
        self._gossip = Gossip(
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
            sign=self._identity.sign,
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
        if self._caps != UploadCaps():
            self._uploads = CappedUploads(self._caps, self._clock, self._serve)
        self._traffic.begin(self._clock.now_s)
        self.report(
            node_events.NodeStarted(self.name, around.run, "virtual", store.incarnation, list(self.links), 0)
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

    def forget(self) -> None:
        """A new machine with an empty disk takes the place of the old one, whose node is down."""
        assert self._gossip is None, "a node that runs has its disk"
        self.store = MemoryStore(self.name)
        if self.ranks is not None:
            self.ranks.forget()

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
        self._gossip = self._uploads = None
        self._events.clear()
        for link in self.links.values():
            link.detach(self.name, why)

    def _say_farewell(self, reason: str) -> None:
        self._refusals.flush(float("inf"))
        self.report(self._traffic.measure(self._clock.now_s))
        self.report(node_events.NodeStopped(self.name, reason))

    def _launch(self) -> None:
        """What a node does before it launches its workers."""
        self.store.incarnation += 1
        self._last = None
        self._feed(gossip.IncarnationRaised(self.store.incarnation))
        if self.ranks is not None:
            self.ranks.launch()

    # --- what the ranks may do -----------------------------------------------------------------------------------------

    def report(self, event: TelemetryEvent) -> None:
        """Add an event to this site's log, now."""
        self._around.on_event(self._clock.now_s, self.name, event)

    def report_traffic(self) -> None:
        """Tell what the links have carried by now, where there are any."""
        if self.links:
            self.report(self._traffic.measure(self._clock.now_s))

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
            node_events.FramePublished(
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
        data = frame.data
        chunk_bytes = self._traffic.chunk_bytes(len(data))
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
        if self._uploads is not None:
            self._uploads.forget(peer)
        self._feed(gossip.PeerClosed(peer, why))

    def received(self, peer: str, payload: Payload) -> None:
        """See `links.Endpoint`."""
        self._feed(gossip.PayloadReceived(peer, payload))

    def rejected(self, peer: str, reason: str, why: str) -> None:
        """See `links.Endpoint`."""
        self._refusals.note(peer, reason, why, self._clock.now_s)

    # --- gossip --------------------------------------------------------------------------------------------------------

    def _tick(self, start: int) -> None:
        if self._gossip is None or start != self.num_starts:
            return
        self._feed(gossip.Ticked())
        now_s, interval_s = self._clock.now_s, self._around.traffic_interval_s
        self._refusals.flush(now_s)
        if interval_s is not None and now_s - self._traffic.measured_s >= interval_s:
            self.report(self._traffic.measure(now_s))
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
        events, now_s = self._events, self._clock.now_s
        while events and self._gossip is not None:
            for action in self._gossip.handle(events.popleft(), now_s):
                if type(action) is gossip.SendPayload:  # by far the most
                    self._send(action.peer, action.lane, action.payload)
                else:
                    self._perform(action, now_s)
        self._is_feeding = False

    def _perform(self, action: gossip.Action, now_s: float) -> None:
        store = self.store
        match action:
            case gossip.Report(event):
                self._note(event, now_s)
            case gossip.ServeChunk(peer, frame_id, index):
                if self._uploads is None:
                    self._serve(peer, frame_id, index)
                elif not self._uploads.ask(peer, frame_id, index):
                    why = f"{peer} wants too many chunks at once"
                    self._refusals.note(peer, OversizedError.reason, why, now_s)
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
            case gossip.SendPayload(peer, lane, payload):
                self._send(peer, lane, payload)
            case _:
                assert_never(action)

    def _serve(self, peer: str, frame_id: str, index: int) -> None:
        data = self.store.read_chunk(frame_id, index)
        if data is None:
            self._send(peer, Lane.CONTROL, encode_message(Gone(frame_id)))
            self._feed(gossip.FrameLost(frame_id))
        else:
            self._send(peer, Lane.BULK, encode_message(Chunk(frame_id, index, data)))

    def _send(self, peer: str, lane: Lane, payload: Payload) -> None:
        num_bytes = len(payload[0])
        if len(payload) > 1:
            num_bytes += len(payload[1]) * (self._scale if lane is Lane.BULK else 1)
        link = self.links[peer]
        if self._uploads is not None and link.is_open:
            self._uploads.spend(peer, num_bytes)
        link.send(self.name, lane, payload, num_bytes)

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

    def _note(self, event: TelemetryEvent, now_s: float) -> None:
        """Log what gossip reports, with the sizes that its frames stand for."""
        match event:
            case node_events.VersionAnnounced(origin, incarnation, step) if origin in self.teachers:
                self.announced[origin] = Version(incarnation, step)  # not of others, for whom it relays
            case node_events.Refused():
                self._refusals.note(event.peer, event.reason, event.why, now_s)
                return
        self.report(scaled(event, self._scale))

    def _report_rejected(self, rejected: Rejected) -> None:
        self.report(
            node_events.Refused(rejected.peer, rejected.reason, rejected.why, num_times=rejected.num_times)
        )
