"""What a simulation came to: from what its jobs left in the run folder to summary, table and report."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.table import Table

from p2pcodistill.errors import GroupError
from p2pcodistill.report.arm_figures import arm_figures
from p2pcodistill.report.comparison import Comparison, arms_table, claims_table, compare, markdown
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.summary import ArmResult, Summary, summarise
from p2pcodistill.report.synthetic import SyntheticResult, summarise_synthetic, synthetic_table
from p2pcodistill.report.table import table
from p2pcodistill.simulation.clocks import put_right
from p2pcodistill.simulation.files import SCENARIO_FILE, NodeFiles, node_files, simulator_events
from p2pcodistill.simulation.job_run import expected_to_finish, failure
from p2pcodistill.simulation.jobs import Job, make_jobs
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.simulation.synthetic_config import RESULT_FILE
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.telemetry.log import EventTail
from p2pcodistill.telemetry.records import Record
from p2pcodistill.topology.build import build_topology

if TYPE_CHECKING:
    from p2pcodistill.report.edges import EdgeResults

_MIN_TABLE_WIDTH = 100
_SUMMARY_FILE = "summary.json"
_REPORT_FILE = "report.html"
_RESULT_FILE = "result.md"


def report(scenario: ScenarioConfig, folder: Path, num_cores: int, stream: TextIO) -> None:
    """Write summary and report of a scenario whose jobs have ended into its run folder; print the table on `stream`.

    Raises GroupError when a site has not finished its training that no fault has taken away.
    """
    tell = _report_training if scenario.synthetic is None else _report_synthetic
    tell(scenario, folder, num_cores, stream)


def _report_training(scenario: ScenarioConfig, folder: Path, num_cores: int, stream: TextIO) -> None:
    # Late: drawing takes a second to import, and nodes need not wait for it.
    from p2pcodistill.report.comparison_html import comparison_section, draw_comparison, save_pictures
    from p2pcodistill.report.html import write_report

    arms = read_results(scenario, folder)
    shown = next((arm for arm in scenario.arms if arm.kind == "codistilled"), scenario.arms[0])
    summary = summarise(scenario.name, arms, scenario.training.num_steps, loss_unit=loss_unit_of(scenario))
    comparison: Comparison | None = None
    section = None
    if scenario.claims or scenario.report.curves or scenario.report.bars:
        comparison = compare(arm_figures(arms, _folders(scenario, folder)), scenario.claims)
        summary["comparison"] = comparison.to_record()
        pictures = draw_comparison(
            comparison, scenario.report.curves, scenario.report.bars, loss_unit=summary["loss_unit"]
        )
        save_pictures(pictures, folder)
        section = comparison_section(comparison, pictures)
        facts = [f"seeds {', '.join(map(str, scenario.seeds))}; {scenario.training.num_steps} steps"]
        (folder / _RESULT_FILE).write_text(markdown(comparison, heading=scenario.title, facts=facts))
    _write_summary(summary, folder)
    write_report(
        folder / _REPORT_FILE,
        title=scenario.title,
        summary=summary,
        arms=arms,
        comparison=section,
        configuration_text=(folder / SCENARIO_FILE).read_text(),
        versions=versions(num_cores),
        edges=_read_edges(scenario, folder),
        topology=build_topology(shown.topology or scenario.topology, scenario.site_names),
    )
    tables = [table(summary)]
    if comparison is not None:
        tables = [arms_table(comparison), *([claims_table(comparison)] if comparison.settled else [])]
    _tell(tables, folder, stream)


def _folders(scenario: ScenarioConfig, folder: Path) -> dict[tuple[str, int], Path]:
    """Where the sites of each arm have their folders under each seed."""
    return {(job.arm.name, job.seed): folder / job.run for job in make_jobs(scenario)}


def _report_synthetic(scenario: ScenarioConfig, folder: Path, num_cores: int, stream: TextIO) -> None:
    from p2pcodistill.report.synthetic_html import write_synthetic_report

    results = [
        SyntheticResult.from_json((folder / job.run / RESULT_FILE).read_text()) for job in make_jobs(scenario)
    ]
    summary = summarise_synthetic(scenario.name, results)
    _write_summary(summary, folder)
    write_synthetic_report(
        folder / _REPORT_FILE,
        title=scenario.title,
        summary=summary,
        result=results[0],
        topology=build_topology(scenario.topology, scenario.site_names),
        configuration_text=(folder / SCENARIO_FILE).read_text(),
        versions=versions(num_cores),
    )
    _tell([synthetic_table(summary)], folder, stream)


def loss_unit_of(scenario: ScenarioConfig) -> str:
    """What held-out losses are counted in."""
    if not isinstance(scenario.task, LanguageModelConfig):
        return "nats/example"
    has_pieces = scenario.data.vocabulary_size is not None or scenario.task.vocabulary is not None
    return "nats/token" if has_pieces else "nats/byte"


def _write_summary(summary: Summary, folder: Path) -> None:
    (folder / _SUMMARY_FILE).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")


def _tell(tables: Sequence[Table], folder: Path, stream: TextIO) -> None:
    console = Console(file=stream)
    console.width = max(console.width, _MIN_TABLE_WIDTH)
    console.print(*tables)
    print(f"summary: {folder / _SUMMARY_FILE}\nreport:  {folder / _REPORT_FILE}", file=stream)


def _read_edges(scenario: ScenarioConfig, folder: Path) -> EdgeResults | None:
    """What happened between the sites of the first codistilled arm under the first seed; None if there is none."""
    from p2pcodistill.report.edges import EdgeResults

    job = next((job for job in make_jobs(scenario) if job.arm.kind == "codistilled"), None)
    if job is None:
        return None
    return EdgeResults.of(
        {place.site: _read_records(job, place, folder) for place in node_files(job, folder)}
    )


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
    told = [r for r in EventTail(simulator_events(job, folder)).read() if r.get("site") == place.site]
    return [*put_right(EventTail(place.events).read(), told), *told]


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
