"""One job in real processes: its links, its sites, their event logs, and what goes wrong with them.

One TaskGroup holds a task for each site, which starts its node and waits for its end, once for each life, and one that
follows the event logs and injects the faults that are due. Cancelling it ends every process, in order first and by force
after a bounded wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from p2pcodistill.errors import GroupError
from p2pcodistill.group.launch import log_tail
from p2pcodistill.simulation.faults import FaultSchedule, absentees, joiners
from p2pcodistill.simulation.files import NodeFiles, free_ports, loopback, simulator_events, write_node_files
from p2pcodistill.simulation.jobs import Job
from p2pcodistill.simulation.links import JobLinks
from p2pcodistill.simulation.scenario import FaultConfig, ScenarioConfig
from p2pcodistill.simulation.site import SiteProcess, describe_exit
from p2pcodistill.telemetry import (
    Event,
    EventLog,
    EventTail,
    FaultInjected,
    Record,
    StepMeasured,
    TrainingEnded,
    TrainingStarted,
    from_record,
    to_record,
)
from p2pcodistill.topology.build import build_topology

POLL_INTERVAL_S = 0.25
FAULT_POLL_INTERVAL_S = 0.05
"""How often events are read while faults are still to come."""
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
    ) -> None:
        self._job = job
        self._scenario = scenario
        self._folder = folder
        names = [site.name for site in job.sites]
        self._ports = free_ports(len(names), taken=taken_ports)
        is_codistilled = job.arm.kind == "codistilled"
        self._faults = scenario.faults if is_codistilled else ()
        topology = build_topology(scenario.topology if is_codistilled else "full", names)
        addresses = dict(zip(names, map(loopback, self._ports), strict=True))
        self._links = JobLinks(scenario, topology, addresses, seed=job.seed) if is_codistilled else None
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
                ports=self._ports,
                dialled=self._links.address if self._links else None,
            )
            self._sites = {
                place.site: SiteProcess(
                    place, node_command=self._node_command, stop_timeout_s=self._stop_timeout_s
                )
                for place in places
            }
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
                for crawl in self._crawls.values():
                    crawl.cancel()
            self._read_events()
            self._require_all_faults()
        finally:
            self._read_events()
            if self._links is not None:
                await self._links.close()
            if self._log is not None and self._links is not None:
                for carried in self._links.measure():
                    self._log.write(carried)
                self._log.close()

    def kill_now(self) -> None:
        """kill -9 of all nodes."""
        for site in self._sites.values():
            site.kill_now()

    # --- sites -----------------------------------------------------------------------------------------------------

    async def _run_site(self, name: str, site: SiteProcess) -> None:
        """All lives of a site, until it ends by itself or nobody will start it again."""
        while self._is_wanted[name].is_set() or self._schedule.starts(name):
            await self._is_wanted[name].wait()
            await site.start()
            self._is_wanted[name].clear()
            try:
                status = await site.wait()
            finally:
                await site.end()
            if not site.is_expected_to_end:
                if status != 0:
                    raise GroupError(failure(self._job, site.place, describe_exit(status)))
                return

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
            if not (is_idle and running <= self._finished):
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
            if fault.kind in ("kill", "leave", "slow-down", "corrupt") and not self._sites[name].is_running:
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
                    self._is_wanted[name].set()
            case "partition":
                assert self._links is not None
                self._links.cut_off(fault.sites)
            case "heal":
                assert self._links is not None
                self._links.heal(fault.sites)
            case "slow-down":
                for name in fault.sites:
                    self._slow_down(name, fault.factor or 1.0, tasks)
            case "corrupt":
                raise AssertionError("refused with the scenario")
        self._read_events()  # what was said before comes before
        assert self._log is not None
        for name in fault.sites:
            record = to_record(FaultInjected(name, fault.kind, self._steps.get(name, 0), fault.factor))
            self._log.write_record(record)
            self._on_record(self._job, name, record)

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
