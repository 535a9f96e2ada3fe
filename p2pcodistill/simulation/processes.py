"""A scenario on this machine with real node processes: start them on the cores there are, follow, stop, report.

One asyncio TaskGroup holds a task per job (see `job_run`). Cancelling it stops its processes, in order first and by force
after a bounded wait; so whatever ends the simulation (the last node, a node that fails, a signal, a bug) ends every process.
Nodes are started so that they die with this process, too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TextIO

from p2pcodistill.errors import ConfigError, GroupError
from p2pcodistill.report.live import make_view
from p2pcodistill.simulation.data import prepare_data
from p2pcodistill.simulation.files import create_run_folder, point_latest, write_scenario
from p2pcodistill.simulation.job_run import JobRun, OnRecord
from p2pcodistill.simulation.jobs import Job, make_jobs, plan, startable
from p2pcodistill.simulation.namespaces import remove_leftovers, require_namespaces
from p2pcodistill.simulation.outcome import read_results, report
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.simulation.search import SEARCH_FOLDER, choose, describe_choice, search_scenario
from p2pcodistill.simulation.virtual.jobs import VirtualJobs
from p2pcodistill.telemetry.records import Record

NODE_COMMAND = (sys.executable, "-m", "p2pcodistill", "node")
# Beyond the time that a node gives its workers to stop.
STOP_MARGIN_S = 15.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def simulate(
    path: Path,
    *,
    data: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    run_root: Path,
    stream: TextIO,
    node_command: Sequence[str] = NODE_COMMAND,
    in_namespaces: bool = False,
) -> int:
    """Run the scenario in the file `path` and report on `stream`; the exit status: 0, or 128 + signal when stopped.

    Everything is kept in a new folder below `run_root` (see `simulation/files.py`). `data` replaces the scenario's text,
    `overrides` are `key=value` assignments. `in_namespaces`: sites of codistilled arms get a network namespace and an
    address each (Linux, root). `node_command` runs a node when its file is appended. To be called from the main
    thread: SIGINT and SIGTERM stop the nodes in order, a second one at once. No process is left when this returns.

    Raises ConfigError, TopologyError, DataError, NamespaceError or RunFolderError before anything is started, and GroupError
    when a node fails, after all others have been stopped.
    """
    scenario = load_scenario(path, overrides, data=data)
    if in_namespaces:
        if scenario.mode == "virtual":
            raise ConfigError('--namespaces is for mode = "processes": sites in virtual time have no network')
        require_namespaces()
        remove_leftovers()
    prepared = prepare_data(scenario)
    folder = create_run_folder(run_root, scenario.name, datetime.now())
    point_latest(folder)
    num_cores = available_cores()

    def run(scenario: ScenarioConfig, folder: Path, title: str) -> signal.Signals | None:
        return _run_jobs(
            scenario,
            folder,
            title,
            num_cores=num_cores,
            stream=stream,
            node_command=node_command,
            in_namespaces=in_namespaces,
        )

    stopped_by = None
    if scenario.search is not None:
        trials_folder = folder / SEARCH_FOLDER
        trials_folder.mkdir()
        trials = write_scenario(search_scenario(scenario), prepared, trials_folder)
        stopped_by = run(trials, trials_folder, f"{scenario.title}: search")
        if stopped_by is None:
            scenario = choose(scenario, read_results(trials, trials_folder), folder)
            print("\n".join(describe_choice(folder)), file=stream)
    if stopped_by is None:
        scenario = write_scenario(scenario, prepared, folder)
        stopped_by = run(scenario, folder, scenario.title)
    if stopped_by is not None:
        print(f"stopped by {stopped_by.name}; what was written until then is in {folder}", file=stream)
        return 128 + stopped_by

    report(scenario, folder, num_cores, stream)
    return 0


def _run_jobs(
    scenario: ScenarioConfig,
    folder: Path,
    title: str,
    *,
    num_cores: int,
    stream: TextIO,
    node_command: Sequence[str],
    in_namespaces: bool,
) -> signal.Signals | None:
    """Run all jobs of the scenario that was written into `folder`; the signal that stopped them, if one did."""
    is_widened = scenario.synthetic is None and "num_threads" not in scenario.group.model_fields_set
    jobs = plan(make_jobs(scenario), num_cores=num_cores, widen=is_widened)
    with make_view(title, stream) as view:

        def on_record(job: Job, site: str, record: Record) -> None:
            view.update(_label(job, scenario), site, record)

        if scenario.mode == "virtual":
            return VirtualJobs(scenario, folder, on_record=on_record).run(jobs, num_cores=num_cores)
        nodes = NodeProcesses(
            scenario,
            folder,
            node_command=node_command,
            on_record=on_record,
            in_namespaces=in_namespaces,
        )
        return asyncio.run(nodes.run(jobs, num_cores=num_cores))


def available_cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    return num_cores


def _label(job: Job, scenario: ScenarioConfig) -> str:
    return job.arm.name if len(scenario.seeds) == 1 else f"{job.arm.name} seed {job.seed}"


class NodeProcesses:
    """The node processes of one simulation; for one use."""

    def __init__(
        self,
        scenario: ScenarioConfig,
        folder: Path,
        *,
        node_command: Sequence[str],
        on_record: OnRecord,
        in_namespaces: bool = False,
    ) -> None:
        self._in_namespaces = in_namespaces
        self._scenario = scenario
        self._folder = folder
        self._node_command = tuple(node_command)
        self._on_record = on_record
        self._ports: set[int] = set()
        self._runs: list[JobRun] = []
        self._stopped_by: signal.Signals | None = None

    async def run(self, jobs: Sequence[Job], *, num_cores: int) -> signal.Signals | None:
        """Run all of `jobs`, as planned, on `num_cores`; the signal that stopped them, or None when they finished.

        Raises GroupError when a node exits with a status other than 0, or a fault never came. Every process has ended by
        then.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for signum in _STOP_SIGNALS:
            loop.add_signal_handler(signum, self._on_signal, signum, task)
        try:
            await self._run(jobs, num_cores)
        except asyncio.CancelledError:
            if self._stopped_by is None:
                raise
            task.uncancel()
        except BaseExceptionGroup as errors:
            # The first is the cause; a node may fail only because another did.
            first = _first_leaf(errors)
            if self._stopped_by is None or not isinstance(first, GroupError):
                raise first from None
        finally:
            for signum in _STOP_SIGNALS:
                loop.remove_signal_handler(signum)
        return self._stopped_by

    def _on_signal(self, signum: signal.Signals, task: asyncio.Task[object]) -> None:
        if self._stopped_by is None:
            self._stopped_by = signum
            task.cancel()
        else:
            for run in self._runs:
                run.kill_now()

    async def _run(self, jobs: Sequence[Job], num_cores: int) -> None:
        waiting = list(jobs)
        num_cores_of: dict[asyncio.Task[None], int] = {}
        async with asyncio.TaskGroup() as tasks:
            while waiting or num_cores_of:
                num_free = num_cores - sum(num_cores_of.values())
                for job in startable(waiting, num_free_cores=num_free, num_cores=num_cores):
                    waiting.remove(job)
                    run = JobRun(
                        job,
                        self._scenario,
                        self._folder,
                        taken_ports=self._ports,
                        node_command=self._node_command,
                        stop_timeout_s=self._scenario.group.stop_grace_s + STOP_MARGIN_S,
                        on_record=self._on_record,
                        in_namespaces=self._in_namespaces,
                    )
                    self._runs.append(run)
                    num_cores_of[tasks.create_task(run.run())] = job.num_cores
                done, _ = await asyncio.wait(num_cores_of, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del num_cores_of[task]


def _first_leaf(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
