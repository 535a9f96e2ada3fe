"""The jobs of a scenario in virtual time: one process each, as many at a time as there are cores for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pcodistill.errors import GroupError
from p2pcodistill.group.launch import log_tail
from p2pcodistill.simulation.files import node_files, simulator_events
from p2pcodistill.simulation.jobs import Job, make_jobs
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.telemetry.log import EventTail
from p2pcodistill.telemetry.records import Record
from p2pcodistill.telemetry.simulation_events import FaultInjected

JOB_COMMAND = (sys.executable, "-m", "p2pcodistill.simulation.virtual.job")
POLL_INTERVAL_S = 0.25
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

OnRecord = Callable[[Job, str, Record], None]


@dataclass(frozen=True, slots=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path


class VirtualJobs:
    """The jobs of one simulation; for one use."""

    def __init__(self, scenario: ScenarioConfig, folder: Path, *, on_record: OnRecord) -> None:
        self._scenario, self._folder, self._on_record = scenario, folder, on_record
        self._order = [(job.run, job.sites) for job in make_jobs(scenario)]
        self._running: list[_Running] = []
        self._stopped_by: signal.Signals | None = None
        self._tails: list[tuple[Job, str, EventTail]] = []

    def run(self, jobs: Sequence[Job], *, num_cores: int) -> signal.Signals | None:
        """Run all of `jobs`, as planned, on `num_cores`; the signal that stopped them, or None when they finished.

        To be called from the main thread. Raises GroupError when one fails. Every process has ended by then.
        """
        waiting = list(jobs)
        handlers = {signum: signal.signal(signum, self._on_signal) for signum in _STOP_SIGNALS}
        try:
            while (waiting or self._running) and self._stopped_by is None:
                self._start(waiting, num_cores)
                time.sleep(POLL_INTERVAL_S)
                self._read_events()
                self._collect()
        finally:
            for running in self._running:
                running.process.kill()
                running.process.wait()
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        return self._stopped_by

    def _on_signal(self, signum: int, _frame: object) -> None:
        self._stopped_by = self._stopped_by or signal.Signals(signum)

    def _start(self, waiting: list[Job], num_cores: int) -> None:
        while waiting:
            num_free = num_cores - sum(running.job.num_threads for running in self._running)
            job = waiting[0]
            if self._running and job.num_threads > num_free:
                return
            waiting.remove(job)
            self._launch(job)

    def _launch(self, job: Job) -> None:
        arm = self._folder / job.run
        arm.mkdir(exist_ok=True)
        index = self._order.index((job.run, job.sites))
        log_path = arm / f"virtual-{index}.log"
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [*JOB_COMMAND, str(os.getpid()), str(self._folder), str(index), str(job.num_threads)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append(_Running(job, process, log_path))
        if self._scenario.synthetic is None:
            self._tails += [
                (job, place.site, EventTail(place.events)) for place in node_files(job, self._folder)
            ]
        self._tails.append((job, "", EventTail(simulator_events(job, self._folder))))

    def _collect(self) -> None:
        for running in list(self._running):
            status = running.process.poll()
            if status is None:
                continue
            self._running.remove(running)
            if status != 0:
                raise GroupError(
                    f"the arm {running.job.arm.name} (seed {running.job.seed}) ended with status {status}; "
                    f"the end of its log, {running.log}:\n{log_tail(running.log)}"
                )

    def _read_events(self) -> None:
        for job, site, tail in self._tails:
            for record in tail.read():
                if site:
                    self._on_record(job, site, record)
                elif self._scenario.synthetic is not None:
                    self._on_record(job, f"{len(job.sites)} sites", record)
                elif record["event"] == FaultInjected.name:
                    self._on_record(job, record["site"], record)
