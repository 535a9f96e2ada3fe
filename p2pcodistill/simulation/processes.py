"""A scenario on this machine with real node processes: start them on the cores there are, follow, stop, report.

One asyncio TaskGroup holds a task per node process and one that reads their event logs for the live view. Cancelling a
node's task stops its process, in order first and by force after a bounded wait; so whatever ends the simulation (the last
node, a node that fails, a signal, a bug) ends every process. Nodes are started so that they die with this process, too.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

from rich.console import Console

from p2pcodistill.errors import GroupError
from p2pcodistill.group.launch import log_tail
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.live import make_view
from p2pcodistill.report.summary import ArmResult, summarise
from p2pcodistill.report.table import table
from p2pcodistill.simulation.files import (
    SCENARIO_FILE,
    NodeFiles,
    create_run_folder,
    free_ports,
    node_files,
    point_latest,
    split_data,
    write_node_files,
    write_scenario,
)
from p2pcodistill.simulation.jobs import Job, make_jobs, plan, startable
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.telemetry import EventTail, Record

NODE_COMMAND = (sys.executable, "-m", "p2pcodistill", "node")
POLL_INTERVAL_S = 0.25
# Beyond the time that a node gives its workers to stop.
STOP_MARGIN_S = 15.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MIN_TABLE_WIDTH = 100

OnRecord = Callable[[Job, str, Record], None]


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
        nodes = NodeProcesses(
            scenario,
            folder,
            node_command=node_command,
            on_record=lambda job, site, record: view.update(_label(job, scenario), site, record),
        )
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
    )
    console = Console(file=stream)
    console.width = max(console.width, _MIN_TABLE_WIDTH)
    console.print(table(summary))
    print(f"summary: {summary_path}\nreport:  {report_path}", file=stream)


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

    Raises GroupError when a site has not finished its training.
    """
    arms: dict[str, ArmResult] = {}
    for job in make_jobs(scenario):
        arm = arms.setdefault(job.run, ArmResult(job.arm.name, job.arm.kind, job.seed, {}))
        for place in node_files(job, folder):
            history = SiteHistory.read(place.events)
            if not history.finished:
                raise GroupError(_failure(job, place, "ended before its training was finished"))
            arm.sites[place.site] = history
    return list(arms.values())


def _failure(job: Job, place: NodeFiles, what: str) -> str:
    tail = log_tail(place.log)
    log = f"the end of its log, {place.log}:\n{tail}" if tail else f"its log, {place.log}, is empty"
    return f"the site {place.site} of the arm {job.arm.name} (seed {job.seed}) {what}; {log}"


def _describe_exit(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"


class NodeProcesses:
    """The node processes of one simulation; for one use."""

    def __init__(
        self, scenario: ScenarioConfig, folder: Path, *, node_command: Sequence[str], on_record: OnRecord
    ) -> None:
        self._scenario = scenario
        self._folder = folder
        self._node_command = tuple(node_command)
        self._on_record = on_record
        self._stop_timeout_s = scenario.group.stop_grace_s + STOP_MARGIN_S
        self._ports: set[int] = set()
        self._tails: list[tuple[Job, str, EventTail]] = []
        self._processes: set[asyncio.subprocess.Process] = set()
        self._stopped_by: signal.Signals | None = None

    async def run(self, jobs: Sequence[Job], *, num_cores: int) -> signal.Signals | None:
        """Run all of `jobs`, as planned, on `num_cores`; the signal that stopped them, or None when they finished.

        Raises GroupError when a node exits with a status other than 0. Every process has ended by then.
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
        except ExceptionGroup as errors:
            # The first is the cause; a node may fail only because another did.
            first = errors.exceptions[0]
            if self._stopped_by is None or not isinstance(first, GroupError):
                raise first from None
        finally:
            for signum in _STOP_SIGNALS:
                loop.remove_signal_handler(signum)
            self._read_events()
        return self._stopped_by

    def _on_signal(self, signum: signal.Signals, task: asyncio.Task[object]) -> None:
        if self._stopped_by is None:
            self._stopped_by = signum
            task.cancel()
        else:
            for process in self._processes:
                _kill(process)

    async def _run(self, jobs: Sequence[Job], num_cores: int) -> None:
        waiting = list(jobs)
        num_cores_of: dict[asyncio.Task[None], int] = {}
        async with asyncio.TaskGroup() as tasks:
            follower = tasks.create_task(self._follow())
            while waiting or num_cores_of:
                num_free = num_cores - sum(num_cores_of.values())
                for job in startable(waiting, num_free_cores=num_free, num_cores=num_cores):
                    waiting.remove(job)
                    ports = free_ports(len(job.sites), taken=self._ports)
                    for place in write_node_files(job, self._scenario, self._folder, ports=ports):
                        num_cores_of[tasks.create_task(self._run_node(job, place))] = job.num_cores_per_site
                done, _ = await asyncio.wait(num_cores_of, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del num_cores_of[task]
            follower.cancel()

    async def _run_node(self, job: Job, place: NodeFiles) -> None:
        self._tails.append((job, place.site, EventTail(place.events)))
        with place.log.open("ab") as log:
            # Forked in this thread, which lives as long as the process does: Linux ties a child's parent-death signal to
            # the thread that made it.
            process = await asyncio.create_subprocess_exec(
                *self._node_command,
                "--die-with-parent",
                str(os.getpid()),
                str(place.node_file.absolute()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # the terminal's Ctrl-C is for this process, which passes it on in order
            )
        self._processes.add(process)
        try:
            status = await process.wait()
        finally:
            await self._end(process)
            self._processes.discard(process)
        if status != 0:
            raise GroupError(_failure(job, place, _describe_exit(status)))

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """See to it that `process` has ended: SIGTERM, a bounded wait, SIGKILL."""
        if process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._stop_timeout_s)
        except TimeoutError:
            _kill(process)
            await process.wait()

    async def _follow(self) -> None:
        while True:
            self._read_events()
            await asyncio.sleep(POLL_INTERVAL_S)

    def _read_events(self) -> None:
        for job, site, tail in self._tails:
            for record in tail.read():
                self._on_record(job, site, record)


def _kill(process: asyncio.subprocess.Process) -> None:
    # The node alone: its workers are below a guard that ends them when the node is gone.
    with suppress(ProcessLookupError):
        process.kill()
