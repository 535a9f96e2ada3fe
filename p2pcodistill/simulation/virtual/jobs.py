"""The jobs of a scenario in virtual time: one process each, as many at a time as there are cores for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pcodistill.errors import GroupError
from p2pcodistill.group.launch import log_tail
from p2pcodistill.simulation.files import node_files, remove_job, simulator_events
from p2pcodistill.simulation.jobs import Job, make_jobs, startable
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.simulation.watch import JobWatch
from p2pcodistill.telemetry.log import EventTail
from p2pcodistill.telemetry.simulation_events import FaultInjected

JOB_COMMAND = (sys.executable, "-m", "p2pcodistill.simulation.virtual.job")
POLL_INTERVAL_S = 0.25
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    tails: list[tuple[str, EventTail]]
    """(site, its events); no site: the simulator's."""


class VirtualJobs:
    """The jobs of one simulation; for one use."""

    def __init__(self, scenario: ScenarioConfig, folder: Path, *, watch: JobWatch) -> None:
        self._scenario, self._folder, self._watch = scenario, folder, watch
        self._order = [(job.run, job.sites) for job in make_jobs(scenario)]
        self._running: list[_Running] = []
        self._stopped_by: signal.Signals | None = None

    def run(self, jobs: Sequence[Job], *, num_cores: int) -> signal.Signals | None:
        """Run all of `jobs`, as planned, on `num_cores`; the signal that stopped them, or None when they finished.

        A job that was stopped before it had ended begins anew, without what it has left, and comes to the same. To be
        called from the main thread. Raises GroupError when one fails. Every process has ended by then.
        """
        waiting = list(jobs)
        handlers = {signum: signal.signal(signum, self._on_signal) for signum in _STOP_SIGNALS}
        try:
            while (waiting or self._running) and self._stopped_by is None:
                self._start(waiting, num_cores)
                time.sleep(POLL_INTERVAL_S)
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
        num_free = num_cores - sum(min(running.job.num_cores, num_cores) for running in self._running)
        for job in startable(waiting, num_free_cores=num_free, num_cores=num_cores):
            waiting.remove(job)
            self._launch(job)

    def _launch(self, job: Job) -> None:
        remove_job(job, self._folder)
        self._watch.begin(job)
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
        tails = [("", EventTail(simulator_events(job, self._folder)))]
        if self._scenario.synthetic is None:
            tails += [(place.site, EventTail(place.events)) for place in node_files(job, self._folder)]
        self._running.append(_Running(job, process, log_path, tails))

    def _collect(self) -> None:
        for running in list(self._running):
            status = running.process.poll()
            self._read_events(running)  # after the look: of one that has ended, all
            if status is None:
                continue
            self._running.remove(running)
            if status != 0:
                raise GroupError(
                    f"the arm {running.job.arm.name} (seed {running.job.seed}) ended with status {status}; "
                    f"the end of its log, {running.log}:\n{log_tail(running.log)}"
                )
            self._watch.end(running.job)

    def _read_events(self, running: _Running) -> None:
        job = running.job
        for site, tail in running.tails:
            for record in tail.read():
                if site:
                    self._watch.note(job, site, record)
                elif self._scenario.synthetic is not None:
                    self._watch.note(job, f"{len(job.sites)} sites", record)
                elif record["event"] == FaultInjected.name:
                    self._watch.note(job, record["site"], record)
