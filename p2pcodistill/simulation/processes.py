"""A scenario on this machine with real node processes: start them on the cores there are, follow, stop, report.

One asyncio TaskGroup holds a task per job (see `job_run`). Cancelling it stops its processes, in order first and by force
after a bounded wait; so whatever ends the simulation (the last node, a node that fails, a signal, a bug) ends every process.
Nodes are started so that they die with this process, too.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TextIO

from p2pcodistill.errors import ConfigError, GroupError
from p2pcodistill.report.live import make_view
from p2pcodistill.report.run_progress import JobProgress, RunProgress
from p2pcodistill.runfolder import lock_folder
from p2pcodistill.simulation.data import prepare_data
from p2pcodistill.simulation.files import (
    SCENARIO_FILE,
    create_run_folder,
    find_run_folder,
    node_files,
    point_latest,
    remove_job,
    rewrite_scenario,
    write_scenario,
)
from p2pcodistill.simulation.finished import FinishedJobs
from p2pcodistill.simulation.job_run import JobRun
from p2pcodistill.simulation.jobs import Job, make_jobs, plan, startable
from p2pcodistill.simulation.namespaces import remove_leftovers, require_namespaces
from p2pcodistill.simulation.outcome import read_results, report
from p2pcodistill.simulation.run_record import note_start, read_setup, write_run_record
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.simulation.search import SEARCH_FOLDER, choose, describe_choice, search_scenario
from p2pcodistill.simulation.virtual.jobs import VirtualJobs
from p2pcodistill.simulation.watch import JobWatch, stage_of

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

    Everything is kept in a new folder below `run_root` (see `simulation/files.py`), in which `resume` goes on. `data`
    replaces the scenario's text, `overrides` are `key=value` assignments. `in_namespaces`: sites of codistilled arms get a
    network namespace and an address each (Linux, root). `node_command` runs a node when its file is appended. To be called
    from the main thread: SIGINT and SIGTERM stop the nodes in order, a second one at once. No process is left when this
    returns.

    Raises ConfigError, TopologyError, DataError, NamespaceError or RunFolderError before anything is started, and GroupError
    when a node fails, after all others have been stopped.
    """
    scenario = load_scenario(path, overrides, data=data)
    if in_namespaces:
        if scenario.mode == "virtual":
            raise ConfigError('--namespaces is for mode = "processes": sites in virtual time have no network')
        require_namespaces()
    prepared = prepare_data(scenario)
    folder = create_run_folder(run_root, scenario.name, datetime.now())
    with lock_folder(folder, "simulation"):
        point_latest(folder)
        write_run_record(folder, available_cores(), in_namespaces=in_namespaces)
        if scenario.search is not None:
            (folder / SEARCH_FOLDER).mkdir()
            write_scenario(search_scenario(scenario), prepared, folder / SEARCH_FOLDER)
        write_scenario(scenario, prepared, folder)
        return _Simulation(folder, stream, node_command).go_on()


def resume(run: Path, *, run_root: Path, stream: TextIO, node_command: Sequence[str] = NODE_COMMAND) -> int:
    """Go on with the simulation in the run folder `run`, where it was stopped; see `simulate`.

    `latest` is the newest below `run_root`. Jobs that have finished are not run again; of one that is complete, the report
    is written anew. Raises RunFolderError for what is no such folder, or in use.
    """
    folder = find_run_folder(run, run_root)
    with lock_folder(folder, "simulation"):
        return _Simulation(folder, stream, node_command).go_on()


class _Simulation:
    """What was written into the run folder `folder`, which this process has locked."""

    def __init__(self, folder: Path, stream: TextIO, node_command: Sequence[str]) -> None:
        self._folder, self._stream, self._node_command = folder, stream, node_command
        self._setup = read_setup(folder)
        self._num_cores = available_cores()

    def go_on(self) -> int:
        """Run what has not finished, and report; the exit status."""
        if self._setup.in_namespaces:
            require_namespaces()
            remove_leftovers()
        how_to_go_on = f"to go on: p2pcodistill simulate --resume {shlex.quote(str(self._folder))}"
        try:
            stopped_by = self._run()
        except (GroupError, KeyboardInterrupt):
            print(f"what has finished is kept; {how_to_go_on}", file=self._stream)
            raise
        if stopped_by is not None:
            print(f"stopped by {stopped_by.name}; {how_to_go_on}", file=self._stream)
            return 128 + stopped_by
        return 0

    def _run(self) -> signal.Signals | None:
        folder = self._folder
        scenario = load_scenario(folder / SCENARIO_FILE)
        stages = {"": stage_of(self._planned(scenario), scenario)}
        if scenario.search is None:  # or its choice is in the scenario already
            progress = self._progress(stages)
        else:
            trials_folder = folder / SEARCH_FOLDER
            trials = load_scenario(trials_folder / SCENARIO_FILE)
            stages = {"search": stage_of(self._planned(trials), trials)} | stages
            progress = self._progress(stages)
            title = f"{scenario.title}: search"
            stopped_by = self._run_jobs(trials, trials_folder, title, progress, stages["search"])
            if stopped_by is not None:
                return stopped_by
            chosen = choose(scenario, read_results(trials, trials_folder), folder)
            rewrite_scenario(chosen, folder)
            scenario = load_scenario(folder / SCENARIO_FILE)
            print("\n".join(describe_choice(folder)), file=self._stream)
        stopped_by = self._run_jobs(scenario, folder, scenario.title, progress, stages[""])
        if stopped_by is None:
            report(scenario, folder, self._stream)
        return stopped_by

    def _planned(self, scenario: ScenarioConfig) -> list[Job]:
        """For as many cores as there were when the run began, so that threads, and with them the results, stay the same."""
        is_widened = scenario.synthetic is None and "num_threads" not in scenario.group.model_fields_set
        return plan(make_jobs(scenario), num_cores=self._setup.num_cores, widen=is_widened)

    def _progress(self, stages: Mapping[str, Mapping[str, JobProgress]]) -> RunProgress:
        in_order = [(name, list(entries.values())) for name, entries in stages.items()]
        return RunProgress(in_order, self._num_cores)

    def _run_jobs(
        self,
        scenario: ScenarioConfig,
        folder: Path,
        title: str,
        progress: RunProgress,
        stage: Mapping[str, JobProgress],
    ) -> signal.Signals | None:
        """Run the jobs of the scenario that was written into `folder` but for those that have finished."""
        finished = FinishedJobs(scenario, folder)
        waiting = []
        for job in self._planned(scenario):
            duration_s = finished.duration_s(job)
            if duration_s is None:
                waiting.append(job)
            else:
                progress.end(stage[job.name], duration_s)
        if not waiting:
            print(f"{folder} is complete", file=self._stream)
            return None
        note_start(self._folder, self._num_cores)
        with make_view(title, self._stream) as view:
            watch = JobWatch(scenario, stage, progress=progress, finished=finished, view=view)
            if scenario.mode == "virtual":
                virtual = VirtualJobs(scenario, folder, watch=watch)
                return virtual.run(waiting, num_cores=self._num_cores)
            nodes = NodeProcesses(
                scenario,
                folder,
                node_command=self._node_command,
                watch=watch,
                in_namespaces=self._setup.in_namespaces,
            )
            return asyncio.run(nodes.run(waiting, num_cores=self._num_cores))


def available_cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    return num_cores


class NodeProcesses:
    """The node processes of one simulation; for one use."""

    def __init__(
        self,
        scenario: ScenarioConfig,
        folder: Path,
        *,
        node_command: Sequence[str],
        watch: JobWatch,
        in_namespaces: bool = False,
    ) -> None:
        self._in_namespaces = in_namespaces
        self._scenario = scenario
        self._folder = folder
        self._node_command = tuple(node_command)
        self._watch = watch
        self._ports: set[int] = set()
        self._runs: list[JobRun] = []
        self._stopped_by: signal.Signals | None = None

    async def run(self, jobs: Sequence[Job], *, num_cores: int) -> signal.Signals | None:
        """Run all of `jobs`, as planned, on `num_cores`; the signal that stopped them, or None when they finished.

        Where nodes have begun and no faults are due, they go on from their training checkpoints, else the job begins anew.
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
                    num_cores_of[tasks.create_task(self._run_job(job))] = job.num_cores
                done, _ = await asyncio.wait(num_cores_of, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del num_cores_of[task]

    async def _run_job(self, job: Job) -> None:
        # Faults come at moments since the job's begin, and nodes without files have nothing to go on with.
        has_faults = bool(self._scenario.faults) and job.arm.kind == "codistilled"
        has_begun = any(place.events.exists() for place in node_files(job, self._folder))
        if has_faults or not has_begun:
            remove_job(job, self._folder)
        self._watch.begin(job)
        run = JobRun(
            job,
            self._scenario,
            self._folder,
            taken_ports=self._ports,
            node_command=self._node_command,
            stop_timeout_s=self._scenario.group.stop_grace_s + STOP_MARGIN_S,
            on_record=self._watch.note,
            in_namespaces=self._in_namespaces,
        )
        self._runs.append(run)
        await run.run()
        self._watch.end(job)


def _first_leaf(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
