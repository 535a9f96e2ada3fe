"""What gossip decides, done: on the store, the transport, the link with the ranks, and the event log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.checkpoint.store import FrameStore, StoredFrame
from p2pcodistill.codistill.freshness import AgeClock
from p2pcodistill.errors import OversizedError, RefusedError
from p2pcodistill.gossip import events as gossip
from p2pcodistill.group.link import NodeLink
from p2pcodistill.group.link_messages import (
    ChainBroken,
    FrameOffer,
    FrameOffered,
    KeyframeWanted,
    VersionKnown,
)
from p2pcodistill.publisher import Publisher
from p2pcodistill.runfolder import is_full_disk
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.node_events import PeerDisconnected, Refused, VersionAnnounced
from p2pcodistill.transport.base import Transport
from p2pcodistill.transport.refusals import RefusalLog

_NUM_OFFERS_KEPT = 2
"""The ranks may still be reading what they were offered before the newest checkpoint of a teacher."""

_MAX_VERSIONS_KNOWN = 32
"""Of each teacher: all of them go into one message."""

_FLUSH_BYTES = 32 << 20
"""So many bytes of chunks are worth a flush: it costs the disk more than them."""


class Performer:
    """Performs one action at a time and says what follows from it. Also knows what the ranks are told of `teachers`."""

    def __init__(
        self,
        teachers: Collection[str],
        *,
        store: FrameStore,
        transport: Transport,
        link: NodeLink,
        publisher: Publisher,
        events: EventLog,
        refusals: RefusalLog,
        serve: Callable[[str, str, int], None],
        forget: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`serve` is called for each chunk of a frame that a peer wants: with peer, frame id and index; `forget` when what a
        peer wanted is not to be served any more.

        `clock`, in seconds, counts the ages of what teachers have announced.
        """
        self._store, self._transport, self._link = store, transport, link
        self._publisher, self._events, self._refusals = publisher, events, refusals
        self._serve, self._forget = serve, forget
        self._offered: dict[str, list[tuple[StoredFrame, ...]]] = {teacher: [] for teacher in teachers}
        self._ages = AgeClock(clock, max_versions=_MAX_VERSIONS_KNOWN)
        self._num_unflushed_bytes = 0
        self._flushing: asyncio.Future[None] | None = None
        for teacher in teachers:
            if chain := self._extend(teacher):
                self._ages.hear({teacher: chain[-1].version})

    async def perform(self, action: gossip.Action) -> Sequence[gossip.Event]:
        """Do it; what gossip is to be told of it. Raises OSError when this site's own store fails."""
        try:
            return await self._perform(action)
        except OSError as error:
            if not is_full_disk(error):
                raise
            return [_refuse_fetch(action, error)]

    async def _perform(self, action: gossip.Action) -> Sequence[gossip.Event]:
        match action:
            case gossip.SendPayload(peer, lane, payload):
                self._transport.send(peer, lane, payload)
            case gossip.BeginFetch(signed):
                try:
                    present = await asyncio.to_thread(self._store.begin, signed)
                    return [gossip.FetchBegun(signed.frame_id, present)]
                except RefusedError as error:
                    return [gossip.FetchRefused(signed.frame_id, error.reason, str(error))]
            case gossip.StoreChunk(frame_id, index, data):
                self._store.put_chunk(frame_id, index, data)
                self._flush(frame_id, len(data))
            case gossip.CompleteFrame(frame_id):
                try:
                    stored = await asyncio.to_thread(self._store.complete, frame_id)
                except ValueError as error:  # the disk did not take the last chunk
                    return [gossip.FetchRefused(frame_id, OversizedError.reason, str(error))]
                chain = self._store.chain(stored.signed.manifest.origin)
                return [gossip.FrameStored(frame_id, held=chain[-1].version if chain else None)]
            case gossip.AbandonFrame(frame_id):
                await asyncio.to_thread(self._store.abandon, frame_id)  # it may wait for the disk
            case gossip.ServeChunk(peer, frame_id, index):
                self._serve(peer, frame_id, index)
            case gossip.PinSchema(origin, schema_hash):
                self._store.pin_schema(origin, schema_hash)
            case gossip.RaiseIncarnation(incarnation):
                self._store.save_incarnation(incarnation)
                return [gossip.FramePublished(signed) for signed in await self._publisher.renew(incarnation)]
            case gossip.RequestKeyframe():
                if not (self._link.joined and self._publisher.has_chain):
                    return [gossip.KeyframeUnavailable()]
                await self._link.send(KeyframeWanted())
            case gossip.OfferFrame(signed):
                if chain := self._extend(signed.manifest.origin):
                    await self._link.send(FrameOffered(_describe(chain)))
            case gossip.DropChain(origin):
                if origin in self._offered:  # or it was relayed
                    self._offered[origin].clear()
                self._store.drop(origin)
            case gossip.Report(Refused() as refused):
                self._refusals.note(refused.peer, refused.reason, refused.why, time.monotonic())
            case gossip.Report(event):
                self._events.write(event)
                if isinstance(event, PeerDisconnected):  # the connection may go on, with a peer in quarantine
                    self._forget(event.peer)
                if isinstance(event, VersionAnnounced) and event.origin in self._offered:
                    self._ages.hear({event.origin: Version(event.incarnation, event.step)})
                    await self._link.send(VersionKnown(event.origin, event.incarnation, event.step))
        return []

    def _flush(self, frame_id: str, num_bytes: int) -> None:
        """Let the disk have what is there while the rest is on its way: little is left to do in the end."""
        self._num_unflushed_bytes += num_bytes
        if self._num_unflushed_bytes >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            self._num_unflushed_bytes = 0
            self._flushing = asyncio.get_running_loop().run_in_executor(None, self._store.flush, frame_id)

    # --- what the ranks are offered --------------------------------------------------------------------------------

    def offers(self) -> tuple[FrameOffer, ...]:
        """The newest checkpoint of each teacher, for ranks that have just joined."""
        return tuple(_describe(chains[-1]) for chains in self._offered.values() if chains)

    def known(self) -> tuple[VersionKnown, ...]:
        """What each teacher had when the node started or has announced since, from its version on offer to the newest."""
        return tuple(
            VersionKnown(teacher, *version, age_s)
            for teacher in self._offered
            for version, age_s in self._ages.ages_s(teacher).items()
        )

    def frames_on_offer(self) -> set[str]:
        """The ids of frames that the ranks may be about to read."""
        return {
            stored.signed.frame_id
            for chains in self._offered.values()
            for chain in chains
            for stored in chain
        }

    def breaks(self, broken: ChainBroken) -> bool:
        """Whether the ranks' trouble with a checkpoint is one with the chain that is stored now."""
        chain = self._store.chain(broken.origin) if broken.origin in self._offered else ()
        if not chain:
            return False
        first = chain[0].version
        return (first.incarnation, first.step) <= (broken.incarnation, broken.step)

    def _extend(self, origin: str) -> tuple[StoredFrame, ...]:
        """What is stored of `origin` now, which from now on is on offer; empty if nothing is."""
        chain = self._store.chain(origin)
        if chain:
            self._offered[origin] = [*self._offered[origin], chain][-_NUM_OFFERS_KEPT:]
            self._ages.forget(origin, chain[-1].version)
        return chain


def _describe(chain: Sequence[StoredFrame]) -> FrameOffer:
    newest = chain[-1]
    return FrameOffer(
        origin=newest.signed.manifest.origin,
        incarnation=newest.version.incarnation,
        step=newest.version.step,
        folder=str(newest.path.parent),
        frames=tuple((f.version.incarnation, f.version.step, f.path.name) for f in chain),
    )


def _refuse_fetch(action: gossip.Action, error: OSError) -> gossip.Event:
    """What no room on the disk means for a teacher's frame: training goes on with the teachers that there are."""
    match action:
        case gossip.BeginFetch(signed):
            frame_id = signed.frame_id
        case gossip.StoreChunk(frame_id) | gossip.CompleteFrame(frame_id):
            pass
        case _:
            raise error
    return gossip.FetchRefused(frame_id, OversizedError.reason, f"no room for it: {error.strerror}")
