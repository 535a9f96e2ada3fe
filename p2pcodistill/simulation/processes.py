"""A scenario on this machine with real node processes: start them on the cores there are, follow, stop, report.

One asyncio TaskGroup holds a task per job (see `job_run`). Cancelling it stops its processes, in order first and by force
after a bounded wait; so whatever ends the simulation (the last node, a node that fails, a signal, a bug) ends every process.
Nodes are started so that they die with this process, too.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console

from p2pcodistill.errors import GroupError
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.live import make_view
from p2pcodistill.report.summary import ArmResult, summarise
from p2pcodistill.report.table import table
from p2pcodistill.simulation.files import (
    SCENARIO_FILE,
    NodeFiles,
    create_run_folder,
    node_files,
    point_latest,
    simulator_events,
    split_data,
    write_scenario,
)
from p2pcodistill.simulation.job_run import JobRun, OnRecord, expected_to_finish, failure
from p2pcodistill.simulation.jobs import Job, make_jobs, plan, startable
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.simulation.virtual.jobs import VirtualJobs
from p2pcodistill.telemetry import EventTail, Record
from p2pcodistill.topology.build import build_topology

if TYPE_CHECKING:
    from p2pcodistill.report.edges import EdgeResults

NODE_COMMAND = (sys.executable, "-m", "p2pcodistill", "node")
# Beyond the time that a node gives its workers to stop.
STOP_MARGIN_S = 15.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MIN_TABLE_WIDTH = 100


def simulate(
    path: Path,
    *,
    data: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    run_root: Path,
    stream: TextIO,
    node_command: Sequence[str] = NODE_COMMAND,
) -> int:
    """Run the scenario in the file `path` and report on `stream`; the exit status: 0, or 128 + signal when stopped.

    Everything is kept in a new folder below `run_root` (see `simulation/files.py`). `data` replaces the scenario's text,
    `overrides` are `key=value` assignments. `node_command` runs a node when its file is appended. To be called from the main
    thread: SIGINT and SIGTERM stop the nodes in order, a second one at once. No process is left when this returns.

    Raises ConfigError, TopologyError, DataError or RunFolderError before anything is started, and GroupError when a node
    fails, after all others have been stopped.
    """
    scenario = load_scenario(path, overrides, data=data)
    text = split_data(scenario)
    folder = create_run_folder(run_root, scenario.name, datetime.now())
    scenario = write_scenario(scenario, text, folder)
    point_latest(folder)
    num_cores = available_cores()
    jobs = plan(
        make_jobs(scenario), num_cores=num_cores, widen="num_threads" not in scenario.group.model_fields_set
    )

    with make_view(scenario.title, stream) as view:

        def on_record(job: Job, site: str, record: Record) -> None:
            view.update(_label(job, scenario), site, record)

        if scenario.mode == "virtual":
            stopped_by = VirtualJobs(scenario, folder, on_record=on_record).run(jobs, num_cores=num_cores)
        else:
            nodes = NodeProcesses(scenario, folder, node_command=node_command, on_record=on_record)
            stopped_by = asyncio.run(nodes.run(jobs, num_cores=num_cores))
    if stopped_by is not None:
        print(f"stopped by {stopped_by.name}; what was written until then is in {folder}", file=stream)
        return 128 + stopped_by

    _report(scenario, folder, num_cores, stream)
    return 0


def _report(scenario: ScenarioConfig, folder: Path, num_cores: int, stream: TextIO) -> None:
    # Late: drawing takes a second to import, and nodes need not wait for it.
    from p2pcodistill.report.html import write_report

    arms = read_results(scenario, folder)
    summary = summarise(scenario.name, arms, scenario.training.num_steps)
    summary_path, report_path = folder / "summary.json", folder / "report.html"
    summary_path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_report(
        report_path,
        title=scenario.title,
        summary=summary,
        arms=arms,
        configuration_text=(folder / SCENARIO_FILE).read_text(),
        versions=versions(num_cores),
        edges=_read_edges(scenario, folder),
        topology=build_topology(scenario.topology, scenario.site_names),
    )
    console = Console(file=stream)
    console.width = max(console.width, _MIN_TABLE_WIDTH)
    console.print(table(summary))
    print(f"summary: {summary_path}\nreport:  {report_path}", file=stream)


def _read_edges(scenario: ScenarioConfig, folder: Path) -> EdgeResults | None:
    """What happened between the sites of the first codistilled arm under the first seed; None if there is none."""
    from p2pcodistill.report.edges import EdgeResults

    job = next((job for job in make_jobs(scenario) if job.arm.kind == "codistilled"), None)
    if job is None:
        return None
    return EdgeResults.of(
        {place.site: _read_records(job, place, folder) for place in node_files(job, folder)}
    )


def available_cores() -> int:
    """Cores that this process may use."""
    if sys.platform == "linux":
        num_cores = len(os.sched_getaffinity(0))
    else:
        num_cores = os.cpu_count() or 1
    return num_cores


def versions(num_cores: int) -> dict[str, str]:
    """What the result was made with. Does not import torch."""
    return {
        "p2pcodistill": _version("p2pcodistill"),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "pyzmq": _version("pyzmq"),
        "platform": platform.platform(),
        "cores": str(num_cores),
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # run from the source folder
        return "not installed"


def _label(job: Job, scenario: ScenarioConfig) -> str:
    return job.arm.name if len(scenario.seeds) == 1 else f"{job.arm.name} seed {job.seed}"


def read_results(scenario: ScenarioConfig, folder: Path) -> list[ArmResult]:
    """What each arm came to under each seed, in the scenario's order, from the event logs.

    Raises GroupError when a site has not finished its training that no fault has taken away.
    """
    arms: dict[str, ArmResult] = {}
    for job in make_jobs(scenario):
        arm = arms.setdefault(job.run, ArmResult(job.arm.name, job.arm.kind, job.seed, {}))
        for place in node_files(job, folder):
            history = SiteHistory.of(_read_records(job, place, folder))
            if not history.finished and place.site in expected_to_finish(job, scenario):
                raise GroupError(failure(job, place, "ended before its training was finished"))
            arm.sites[place.site] = history
    return list(arms.values())


def _read_records(job: Job, place: NodeFiles, folder: Path) -> list[Record]:
    """What a site told of itself, then what the simulator told of it."""
    told = EventTail(simulator_events(job, folder)).read()
    return [*EventTail(place.events).read(), *(r for r in told if r.get("site") == place.site)]


class NodeProcesses:
    """The node processes of one simulation; for one use."""

    def __init__(
        self, scenario: ScenarioConfig, folder: Path, *, node_command: Sequence[str], on_record: OnRecord
    ) -> None:
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
                    )
                    self._runs.append(run)
                    num_cores_of[tasks.create_task(run.run())] = job.num_cores
                done, _ = await asyncio.wait(num_cores_of, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del num_cores_of[task]


def _first_leaf(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
