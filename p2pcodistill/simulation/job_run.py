"""One job in real processes: its links, its sites, their event logs, and what goes wrong with them.

One TaskGroup holds a task for each site, which starts its node (or what takes its place) and waits for its end, once for
each life, and one that follows the event logs and injects the faults that are due. Cancelling it ends every process, in
order first and by force after a bounded wait.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from p2pcodistill.errors import GroupError
from p2pcodistill.group.launch import log_tail
from p2pcodistill.simulation.clocks import WrongClock
from p2pcodistill.simulation.fault_config import NEEDS_RUNNING, FaultConfig
from p2pcodistill.simulation.faults import FaultSchedule, absentees, joiners, told
from p2pcodistill.simulation.files import NodeFiles, free_ports, loopback, simulator_events, write_node_files
from p2pcodistill.simulation.hostile import Deed
from p2pcodistill.simulation.jobs import Job
from p2pcodistill.simulation.links import JobLinks
from p2pcodistill.simulation.machines import add_impostor, replace_machine
from p2pcodistill.simulation.namespaces import SiteNetwork
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.simulation.site import SiteProcess, describe_exit
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.log import EventLog, EventTail
from p2pcodistill.telemetry.records import Record, from_record, to_record
from p2pcodistill.telemetry.training_events import StepMeasured, TrainingEnded, TrainingStarted
from p2pcodistill.topology.build import build_topology

POLL_INTERVAL_S = 0.25
FAULT_POLL_INTERVAL_S = 0.05
"""How often events are read while faults are still to come."""
HOSTILE_COMMAND = (sys.executable, "-m", "p2pcodistill.simulation.hostile_node")
LINGER_S = 5.0
"""What sites that have all finished get to leave by themselves."""

OnRecord: TypeAlias = Callable[[Job, str, Record], None]


class JobRun:
    """Runs one job, once."""

    def __init__(
        self,
        job: Job,
        scenario: ScenarioConfig,
        folder: Path,
        *,
        taken_ports: set[int],
        node_command: Sequence[str],
        stop_timeout_s: float,
        on_record: OnRecord,
        in_namespaces: bool = False,
    ) -> None:
        """`in_namespaces`: the sites of a codistilled arm get a network namespace each."""
        self._job = job
        self._scenario = scenario
        self._folder = folder
        scenario = scenario.of_arm(job.arm)
        names = [site.name for site in job.sites]
        is_codistilled = job.arm.kind == "codistilled"
        self._network = SiteNetwork(names) if in_namespaces and is_codistilled else None
        if self._network is not None:
            self._addresses = self._network.addresses
        else:
            ports = free_ports(len(names), taken=taken_ports)
            self._addresses = dict(zip(names, map(loopback, ports), strict=True))
        self._faults = scenario.faults if is_codistilled else ()
        topology = build_topology(scenario.topology if is_codistilled else "full", names)
        self._links = (
            JobLinks(scenario, topology, self._addresses, seed=job.seed, network=self._network)
            if is_codistilled
            else None
        )
        self._node_command = tuple(node_command)
        self._stop_timeout_s = stop_timeout_s
        self._on_record = on_record
        self._schedule = FaultSchedule(self._faults)
        self._log: EventLog | None = None
        self._sites: dict[str, SiteProcess] = {}
        self._tails: dict[str, EventTail] = {}
        self._is_wanted = {name: asyncio.Event() for name in names}
        self._steps: dict[str, int] = {}
        self._finished: set[str] = set()
        self._crawls: dict[str, asyncio.Task[None]] = {}
        self._taken_ports = taken_ports
        self._clocks: dict[str, WrongClock] = {}
        self._deeds: dict[str, Deed] = {}  # of the sites that are no honest nodes in their present life
        self._between_lives: set[str] = set()
        self._impostors: dict[SiteProcess, asyncio.Task[None]] = {}
        self._begun_s = 0.0

    async def run(self) -> None:
        """From the first start to the end of the last process.

        Raises GroupError when a site fails, or a fault never came.
        """
        try:
            if self._links is not None:
                await self._links.open()
            places = write_node_files(
                self._job,
                self._scenario,
                self._folder,
                addresses=list(self._addresses.values()),
                dialled=self._links.address if self._links else None,
            )
            for fault in self._faults:
                if fault.kind == "clock":
                    for name in fault.sites:
                        folder = self._folder / self._job.run / "clocks" / name
                        self._clocks[name] = self._clocks.get(name) or WrongClock(folder)
            self._sites = {place.site: self._process(place) for place in places}
            self._tails = {place.site: EventTail(place.events) for place in places}
            if self._links is not None:
                self._log = EventLog(simulator_events(self._job, self._folder))
            self._begun_s = time.monotonic()
            late = joiners(self._faults)
            async with asyncio.TaskGroup() as tasks:
                follower = tasks.create_task(self._follow(tasks))
                lives = []
                for name, site in self._sites.items():
                    if name not in late:
                        self._is_wanted[name].set()
                    lives.append(tasks.create_task(self._run_site(name, site)))
                await asyncio.wait(lives)
                follower.cancel()
                for impostor in self._impostors.values():
                    impostor.cancel()
                for crawl in self._crawls.values():
                    crawl.cancel()
            self._read_events()
            self._require_all_faults()
        finally:
            try:
                self._read_events()
            finally:
                if self._links is not None:
                    await self._links.close()
                if self._log is not None and self._links is not None:
                    for carried in self._links.measure():
                        self._log.write(carried)
                    self._log.close()

    def kill_now(self) -> None:
        """kill -9 of all nodes."""
        for site in (*self._sites.values(), *self._impostors):
            site.kill_now()

    # --- sites -----------------------------------------------------------------------------------------------------

    def _process(self, place: NodeFiles, *, site: str | None = None) -> SiteProcess:
        """A node with the files `place`; `site` is where it runs, if it has another name."""
        network = self._network
        clock = self._clocks.get(place.site)
        return SiteProcess(
            place,
            node_command=self._node_command,
            stop_timeout_s=self._stop_timeout_s,
            environment=clock.environment if clock else None,
            command_prefix=network.command_prefix(site or place.site) if network else (),
        )

    async def _run_site(self, name: str, site: SiteProcess) -> None:
        """All lives of a site, until it ends by itself or nobody will start it again."""
        while self._is_wanted[name].is_set() or name in self._between_lives or self._schedule.starts(name):
            await self._is_wanted[name].wait()
            deed = self._deeds.get(name)
            self._read_events()
            self._finished.discard(name)  # what an earlier life said of its end
            await site.start(None if deed is None else (*HOSTILE_COMMAND, deed))
            self._is_wanted[name].clear()
            try:
                status = await site.wait()
            finally:
                await site.end()
            if not site.is_expected_to_end:
                if status != 0:
                    raise GroupError(failure(self._job, site.place, describe_exit(status)))
                return

    async def _run_impostor(self, impostor: SiteProcess) -> None:
        try:
            await impostor.start()
            status = await impostor.wait()
        finally:
            await impostor.end()
        if status != 0 and not impostor.is_expected_to_end:
            raise GroupError(failure(self._job, impostor.place, describe_exit(status)))

    # --- events and faults -----------------------------------------------------------------------------------------

    async def _follow(self, tasks: asyncio.TaskGroup) -> None:
        idle_from_s: float | None = None
        while True:
            self._read_events()
            while not self._is_starting and (fault := self._pop_due()) is not None:
                await self._inject(fault, tasks)
            running = {name for name, site in self._sites.items() if site.is_running}
            if self._schedule.pending and not (running or self._is_starting or self._schedule.next_s):
                self._require_all_faults()
            # Where some are gone or out of reach, or a last word was lost, sites that have finished would wait long.
            is_idle = not (self._schedule.pending or self._is_starting)
            if not (is_idle and running <= self._finished | self._deeds.keys()):
                idle_from_s = None
            elif idle_from_s is None:
                idle_from_s = time.monotonic()
            elif time.monotonic() - idle_from_s > LINGER_S:
                await asyncio.gather(*(self._sites[name].end() for name in running))
            await asyncio.sleep(FAULT_POLL_INTERVAL_S if self._schedule.pending else POLL_INTERVAL_S)

    @property
    def _is_starting(self) -> bool:
        return any(wanted.is_set() for wanted in self._is_wanted.values())

    def _pop_due(self) -> FaultConfig | None:
        return self._schedule.pop_due(time.monotonic() - self._begun_s, self._steps)

    def _read_events(self) -> None:
        for name, tail in self._tails.items():
            for record in tail.read():
                with suppress(ValueError):  # of another version
                    self._note(name, from_record(record))
                self._on_record(self._job, name, record)

    def _note(self, name: str, event: Event) -> None:
        match event:
            case TrainingStarted(start_step=step):
                self._finished.discard(name)
            case TrainingEnded(step=step, finished=finished):
                if finished:
                    self._finished.add(name)
            case StepMeasured(step=step):
                pass
            case _:
                return
        self._steps[name] = max(step, self._steps.get(name, 0))

    async def _inject(self, fault: FaultConfig, tasks: asyncio.TaskGroup) -> None:
        for name in fault.sites:
            site = self._sites[name]
            is_there = site.is_running or (fault.kind == "replace" and site.is_expected_to_end)
            if fault.kind in (*NEEDS_RUNNING, "replace") and not is_there:
                raise GroupError(
                    f"{_describe(fault)} came too late: the node of {name!r} had ended by itself"
                )
        sites = [self._sites[name] for name in fault.sites]
        match fault.kind:
            case "kill":
                await asyncio.gather(*(site.kill() for site in sites))
            case "leave":
                await asyncio.gather(*(site.end() for site in sites))
            case "restart" | "join":
                for name in fault.sites:
                    self._begin_life(name)
            case "replace" | "corrupt" | "hostile":
                self._between_lives.update(fault.sites)
                await asyncio.gather(*(site.kill() for site in sites if site.is_running))
                for name in fault.sites:
                    if fault.kind == "replace":
                        await asyncio.to_thread(replace_machine, self._sites[name].place)
                    self._begin_life(name, "ruin" if fault.kind == "corrupt" else fault.does)
                self._between_lives.difference_update(fault.sites)
            case "impostor":
                for site in sites:
                    (port,) = free_ports(1, taken=self._taken_ports)
                    impostor = self._process(add_impostor(site.place, port=port), site=site.place.site)
                    self._impostors[impostor] = tasks.create_task(self._run_impostor(impostor))
            case "clock":
                for name in fault.sites:
                    self._clocks[name].set(fault.offset_s or 0.0)
            case "partition" | "black-hole":
                assert self._links is not None
                self._links.separate(fault)
            case "heal":
                assert self._links is not None
                self._links.heal(fault.sites)
            case "slow-down":
                for name in fault.sites:
                    self._slow_down(name, fault.factor or 1.0, tasks)
        self._read_events()  # what was said before comes before
        assert self._log is not None
        for name in fault.sites:
            record = to_record(told(fault, name, self._steps.get(name, 0)))
            self._log.write_record(record)
            self._on_record(self._job, name, record)

    def _begin_life(self, name: str, deed: Deed | None = None) -> None:
        """Start a site that is down: as an honest node, or to do nothing but that."""
        self._deeds.pop(name, None)
        if deed is not None:
            self._deeds[name] = deed
        self._is_wanted[name].set()

    def _slow_down(self, name: str, factor: float, tasks: asyncio.TaskGroup) -> None:
        if (crawl := self._crawls.pop(name, None)) is not None:
            crawl.cancel()
        if factor > 1:
            self._crawls[name] = tasks.create_task(self._sites[name].crawl(factor))

    def _require_all_faults(self) -> None:
        for fault in self._schedule.pending:
            raise GroupError(
                f"{_describe(fault)} never came: the sites had ended at "
                + ", ".join(f"step {self._steps.get(name, 0)} ({name})" for name in self._sites)
                + "; choose an earlier moment"
            )


def _describe(fault: FaultConfig) -> str:
    return f"the fault {fault.kind!r} of {', '.join(map(repr, fault.sites))} {fault.when}"


def failure(job: Job, place: NodeFiles, what: str) -> str:
    """What to tell of a site that failed: where, how, and its last words."""
    tail = log_tail(place.log)
    log = f"the end of its log, {place.log}:\n{tail}" if tail else f"its log, {place.log}, is empty"
    return f"the site {place.site} of the arm {job.arm.name} (seed {job.seed}) {what}; {log}"


def expected_to_finish(job: Job, scenario: ScenarioConfig) -> frozenset[str]:
    """The sites of the job that no fault takes away for good."""
    gone = absentees(scenario.faults) if job.arm.kind == "codistilled" else frozenset()
    return frozenset(site.name for site in job.sites if site.name not in gone)
