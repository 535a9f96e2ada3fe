"""The node: composition root of the byte plane, one asyncio process a site.

It joins transport, gossip, store and link, supervises the site's workers, and has one TaskGroup and one shutdown path:

    transport ──events──▶ gossip ──actions──▶ store, transport, link, event log   (actions.py)
    link      ──frames──▶ sign, store ──▶ gossip                                  (publisher.py)
    link      ──events──▶ event log
    workers   ──exit────▶ restart with back-off, or finish, linger, leave

What arrives from a peer can be refused but cannot stop the node; whatever else goes wrong does stop it, and its workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from p2pcodistill.actions import Performer
from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.config import GroupSpec, NodeConfig
from p2pcodistill.errors import MalformedError, RunFolderError, UserError
from p2pcodistill.gossip import events as gossip
from p2pcodistill.gossip.membership import members_digest
from p2pcodistill.gossip.protocol import Gossip
from p2pcodistill.group.lifeline import adopt_orphans
from p2pcodistill.group.link import NodeLink
from p2pcodistill.group.link_messages import (
    ChainBroken,
    EventHappened,
    FrameReady,
    Joined,
    Left,
    LinksMeasured,
    ReferenceReady,
    StopRequested,
    TrustChanged,
    Welcome,
)
from p2pcodistill.group.supervise import StopSwitch, Supervisor, first_of
from p2pcodistill.linger import linger
from p2pcodistill.links import LinkMeter
from p2pcodistill.measuring import Measurements
from p2pcodistill.publisher import Publisher
from p2pcodistill.reload import Reload, compare
from p2pcodistill.runfolder import RunFolder, is_full_disk
from p2pcodistill.site_plan import SitePlan
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.node_events import ConfigReloaded, NodeStarted, NodeStopped, Refused
from p2pcodistill.telemetry.records import Record
from p2pcodistill.transport.base import Closed, Opened, Received, Rejected
from p2pcodistill.transport.buffers import keep_freed_buffers
from p2pcodistill.transport.refusals import RefusalLog
from p2pcodistill.transport.shaper import UploadCaps
from p2pcodistill.transport.zeromq import ZeroMQTransport
from p2pcodistill.uploads import Uploads

TICK_S = 1.0
REFUSAL_INTERVAL_S = 1.0
LAST_WORDS_TIMEOUT_S = 20.0
REVOKED_WHY = "it is listed under `revoked`"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a node ended: `exit_status` is 0 when training finished, 128 + signal when it was stopped."""

    reason: str
    exit_status: int


class Node:
    """One site. Build it (bad input raises UserError before anything starts), then `await run()` once."""

    def __init__(
        self,
        config: NodeConfig,
        *,
        base_folder: Path,
        subscriber: Callable[[Record], None] | None = None,
        reload: Callable[[], NodeConfig] | None = None,
    ) -> None:
        """`base_folder` is what relative paths in `config` mean; `subscriber` sees every event as a record. `reload` reads
        the configuration again, at a SIGHUP; without it that stops the node."""
        self._config = config
        self._plan = plan = SitePlan(config, base_folder=base_folder)
        self._transport = ZeroMQTransport(plan.identity, config.listen, plan.endpoints, denied=config.revoked)
        self._folder = RunFolder(plan.run_folder, plan.describe())
        self._store = FrameStore(self._folder.store, site=config.name, keys=plan.keys)
        self._events = EventLog(self._folder.events, *([subscriber] if subscriber else []))
        self._link = NodeLink(self._folder.link_pointer)
        self._gossip = Gossip(
            site=config.name,
            run=config.run,
            members=plan.keys,
            teachers=plan.teachers,
            students=plan.students,
            members_digest=members_digest(plan.keys),
            topology_digest=plan.topology.digest,
            incarnation=self._store.incarnation,
            held={name: chain[-1].version for name in plan.teachers if (chain := self._store.chain(name))},
            own_frames=[stored.signed for stored in self._store.frames(config.name)],
            pinned_schemas={m: pin for m in plan.keys if (pin := self._store.pinned_schema(m)) is not None},
            max_frame_bytes=config.max_frame_bytes,
            students_of={member: plan.topology.students_of(member) for member in plan.keys},
            chains={
                name: [stored.signed for stored in self._store.frames(name) if not stored.is_local]
                for name in plan.teachers
            },
            relay=config.relay,
            sign=plan.identity.sign,
        )
        self._gossip_lock = asyncio.Lock()
        self._refusals = RefusalLog(self._report_refusal, REFUSAL_INTERVAL_S)
        caps = UploadCaps.of(config)
        self._uploads = Uploads(self._store, self._transport, self._refusals, self._lose_frame, caps)
        self._links = LinkMeter(
            plan.students,
            caps,
            self._transport.traffic,
            lambda: self._gossip.links,
            self._uploads.num_waiting_bytes,
        )
        self._measurements = Measurements(self._transport.traffic, self._links, self._events)
        self._publisher = Publisher(
            config.name,
            config.run,
            identity=plan.identity,
            store=self._store,
            outbox=self._folder.outbox,
            events=self._events,
            gossip_lock=self._gossip_lock,
            announce=lambda signed: self._feed_locked(gossip.FramePublished(signed)),
            answer=self._link.send,
            chunk_bytes=self._links.chunk_bytes,
        )
        self._performer = Performer(
            plan.teachers,
            store=self._store,
            transport=self._transport,
            link=self._link,
            publisher=self._publisher,
            events=self._events,
            refusals=self._refusals,
            serve=self._uploads.serve,
            forget=self._uploads.forget,
        )
        self._ranks_left = asyncio.Event()
        self._gossip_moved = asyncio.Event()
        self._stop = StopSwitch(self._events)
        self._reload = reload
        self._reload_requested = asyncio.Event()

    # --- life ------------------------------------------------------------------------------------------------------

    async def run(self) -> Outcome:
        """Listen, train, exchange, finish, leave. Raises UserError (port in use, full disk, workers that keep failing)."""
        adopt_orphans()
        keep_freed_buffers()
        outcome = Outcome("failed", 1)
        with self._stop.on_signals(self._reload_requested.set if self._reload else None):
            try:
                await self._transport.open()
                link_address = self._link.open()
                self._events.write(
                    NodeStarted(
                        site=self._config.name,
                        run=self._config.run,
                        listen=self._transport.listen_address,
                        incarnation=self._store.incarnation,
                        neighbours=list(self._plan.neighbours),
                        pid=os.getpid(),
                    )
                )
                for name in self._config.revoked:
                    await self._feed(gossip.MemberRevoked(name, REVOKED_WHY))
                outcome = await self._run_tasks(link_address)
            except BaseExceptionGroup as errors:
                raise self._explain(_first_leaf(errors)) from errors
            finally:
                with contextlib.suppress(OSError):  # a full disk is told by the error that ended the tasks
                    self._refusals.flush(float("inf"))
                    self._measurements.flush()
                    self._events.write(NodeStopped(site=self._config.name, reason=outcome.reason))
                await self._transport.close()
                self._link.close()
                await asyncio.to_thread(self._store.close)  # it may wait for the disk
                self._events.close()
                self._folder.close()
        return outcome

    async def _run_tasks(self, link_address: str) -> Outcome:
        async with asyncio.TaskGroup() as tasks:
            pumps = [
                tasks.create_task(pump(), name=pump.__qualname__)
                for pump in (
                    self._pump_transport,
                    self._pump_link,
                    self._pump_ticks,
                    self._pump_reloads,
                    self._publisher.run,
                    self._uploads.run,
                )
            ]
            outcome = await self._supervise(link_address)
            for pump in pumps:
                pump.cancel()
        return outcome

    def _explain(self, error: BaseException) -> BaseException:
        if isinstance(error, OSError) and is_full_disk(error):
            return RunFolderError(
                f"the disk that holds {self._folder.path} is full: make room, then run the same command again; "
                "what was complete is kept"
            )
        return error

    # --- the workers -----------------------------------------------------------------------------------------------

    async def _supervise(self, link_address: str) -> Outcome:
        supervisor = Supervisor(
            self._config.group, self._events, self._folder.group_spec, self._folder.group_log, self._stop
        )
        finished = await supervisor.run(lambda: self._prepare_launch(link_address), self._ask_ranks_to_stop)
        if self._link.joined:  # what rank 0 said last may still be on its way
            await first_of(self._ranks_left, self._stop.at_once, timeout_s=LAST_WORDS_TIMEOUT_S)
            drained = asyncio.create_task(self._publisher.drained())
            await first_of(drained, self._stop.at_once)
            drained.cancel()
        if finished:
            await self._feed(gossip.TrainingFinished())
            await linger(
                self._gossip, self._gossip_moved, self._stop.requested, linger_s=self._config.linger_s
            )
        if self._stop.requested.is_set():
            return Outcome("stopped", 128 + self._stop.signal)
        return Outcome("finished", 0)

    async def _prepare_launch(self, link_address: str) -> GroupSpec:
        """What the ranks of the next launch are told."""
        # They may train the same steps again from a checkpoint: their versions must be newer than the last launch's.
        async with self._gossip_lock:
            incarnation = self._store.incarnation + 1
            self._store.save_incarnation(incarnation)
            await self._feed_locked(gossip.IncarnationRaised(incarnation))
            self._publisher.begin_launch()
        self._ranks_left.clear()
        token = secrets.token_hex(8)
        self._link.expect(token)
        return self._plan.group_spec(self._folder, link_address=link_address, link_token=token)

    async def _ask_ranks_to_stop(self) -> bool:
        """Ask the ranks to agree on a step, checkpoint and exit; False when none has joined, so that nothing is lost."""
        await self._link.send(StopRequested())
        return self._link.joined

    # --- gossip ----------------------------------------------------------------------------------------------------

    async def _pump_transport(self) -> None:
        while True:
            match await self._transport.receive():
                case Opened(peer):
                    await self._feed(gossip.PeerOpened(peer))
                case Closed(peer, why):
                    self._uploads.forget(peer)
                    self._links.lose(peer)
                    await self._feed(gossip.PeerClosed(peer, why))
                case Received(peer, _, payload):
                    await self._feed(gossip.PayloadReceived(peer, payload))
                case Rejected() as rejected:  # the transport tells of them at a bearable rate
                    self._report_refusal(rejected)

    async def _pump_ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            await self._feed(gossip.Ticked())
            self._refusals.flush(time.monotonic())
            if (rate_bytes_s := self._measurements.tick()) is not None:
                await self._link.send(LinksMeasured(rate_bytes_s))
            in_use = self._gossip.frames_in_use(time.monotonic()) | self._performer.frames_on_offer()
            for frame_id in self._store.prune(keep_frame_ids=in_use, relayed_origins=self._plan.others):
                await self._feed(gossip.FrameLost(frame_id))

    async def _pump_reloads(self) -> None:
        """Read the configuration again when asked to. One that cannot be is told of, and the one in force stays."""
        while True:
            await self._reload_requested.wait()
            self._reload_requested.clear()
            assert self._reload is not None, "else nobody asks"
            try:
                found = compare(self._config, self._reload())
            except UserError as error:
                self._events.write(Refused(None, "configuration", f"not reloaded: {error}"))
                continue
            await self._adopt(found)

    async def _adopt(self, found: Reload) -> None:
        self._config = found.config
        for name in found.revoked:
            await self._feed(gossip.MemberRevoked(name, REVOKED_WHY))
            self._transport.deny(name)  # behind what gossip had to say to it
            await self._link.send(TrustChanged(name, is_trusted=False))
        for name in found.restored:
            await self._feed(gossip.MemberRestored(name))
            self._transport.admit(name)
            await self._link.send(TrustChanged(name, is_trusted=True))
        for name, address in found.addresses.items():
            if name in self._plan.dialled:
                self._transport.move(name, address)
        changed = ["revoked"] if found.revoked or found.restored else []
        changed += [f"address of {name}" for name in found.addresses]
        self._events.write(ConfigReloaded(changed, list(found.needs_restart)))
        if found.needs_restart:
            why = f"changed, but ignored until the node is started again: {', '.join(found.needs_restart)}"
            self._events.write(Refused(None, "configuration", why))

    async def _lose_frame(self, frame_id: str) -> None:
        await self._feed(gossip.FrameLost(frame_id))

    async def _feed(self, event: gossip.Event) -> None:
        """Hand one event to gossip and do what it decides, including what follows from that."""
        async with self._gossip_lock:
            await self._feed_locked(event)

    async def _feed_locked(self, event: gossip.Event) -> None:
        events = [event]
        while events:
            for action in self._gossip.handle(events.pop(0), time.monotonic()):
                events += await self._performer.perform(action)
        self._gossip_moved.set()

    # --- the link --------------------------------------------------------------------------------------------------

    async def _pump_link(self) -> None:
        while True:
            try:
                message = await self._link.receive()
            except MalformedError as error:
                self._events.write(Refused(peer=None, reason=error.reason, why=f"from the ranks: {error}"))
                continue
            match message:
                case Joined():
                    offers, known = self._performer.offers(), self._performer.known()
                    await self._link.send(Welcome(offers, known, self._config.revoked))
                    if self._stop.requested.is_set():
                        await self._link.send(StopRequested())
                case EventHappened(record):
                    self._events.write_record(record)
                case FrameReady() | ReferenceReady():
                    self._publisher.submit(message)
                case ChainBroken() if self._performer.breaks(message):
                    await self._feed(gossip.ChainBroken(message.origin))
                case Left():
                    self._ranks_left.set()

    def _report_refusal(self, rejected: Rejected) -> None:
        self._events.write(Refused(rejected.peer, rejected.reason, rejected.why, rejected.num_times))


def _first_leaf(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
