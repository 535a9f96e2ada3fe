"""What a simulation came to: from what its jobs left in the run folder to summary, table and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from p2pcodistill.checkpoint.durable import write_whole
from p2pcodistill.errors import GroupError, RunFolderError
from p2pcodistill.report.arm_figures import arm_figures
from p2pcodistill.report.comparison import Comparison, arms_table, claims_table, compare, markdown
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.recorded import loss_unit_of_task
from p2pcodistill.report.results import REPORT_FILE, RESULT_FILE, tell, write_summary
from p2pcodistill.report.summary import ArmResult, summarise
from p2pcodistill.report.synthetic import SyntheticResult, summarise_synthetic, synthetic_table
from p2pcodistill.report.table import table
from p2pcodistill.simulation.clocks import put_right
from p2pcodistill.simulation.files import SCENARIO_FILE, NodeFiles, node_files, simulator_events
from p2pcodistill.simulation.job_run import expected_to_finish, failure
from p2pcodistill.simulation.jobs import Job, make_jobs
from p2pcodistill.simulation.run_record import describe_changes, read_run_record
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.simulation.synthetic_config import RESULT_FILE as SYNTHETIC_RESULT_FILE
from p2pcodistill.telemetry.log import EventTail
from p2pcodistill.telemetry.records import Record
from p2pcodistill.topology.build import build_topology

if TYPE_CHECKING:
    from p2pcodistill.report.edges import EdgeResults


def report(
    scenario: ScenarioConfig,
    folder: Path,
    stream: TextIO,
    *,
    out: Path | None = None,
    baseline: str | None = None,
    is_partial: bool = False,
) -> None:
    """Write summary and report of the scenario's run in `folder` into `out`, by default there; print its table.

    `baseline` is the arm that the others are compared with, by default the strongest of those that claims compare with.
    With `is_partial`, jobs need not have ended: the report is of what there is, and says what is missing. The Markdown file
    is written last, and only of what is complete.

    Raises GroupError when a site has not finished its training that no fault has taken away, and RunFolderError when nothing
    that could be reported has happened yet, or the run is of another format.
    """
    write = _report_training if scenario.synthetic is None else _report_synthetic
    write(scenario, folder, stream, out or folder, baseline, is_partial)


def _report_training(
    scenario: ScenarioConfig,
    folder: Path,
    stream: TextIO,
    out: Path,
    baseline: str | None,
    is_partial: bool,
) -> None:
    # Late: drawing takes a second to import, and nodes need not wait for it.
    from p2pcodistill.report.comparison_figures import CURVE_AXES
    from p2pcodistill.report.comparison_html import comparison_section, draw_comparison, save_pictures
    from p2pcodistill.report.html import write_report

    made_with = read_run_record(folder)
    results = read_results(scenario, folder, is_partial=is_partial)
    missing = unfinished(scenario, results)
    changes = describe_changes(folder)
    arms = evaluated(scenario, results, folder)
    names = {arm.name for arm in arms}
    shown = next(
        (arm for arm in scenario.arms if arm.kind == "codistilled" and arm.name in names), scenario.arms[0]
    )
    summary = summarise(scenario.name, arms, scenario.training.num_steps, loss_unit=loss_unit_of(scenario))
    summary["notes"] = [
        *unfinished(scenario, [a for a in results if a not in arms]),
        *changes,
        *summary["notes"],
    ]
    comparison: Comparison | None = None
    section = None
    if scenario.claims or scenario.report.curves or scenario.report.bars or baseline is not None:
        figures = arm_figures(arms, _folders(scenario, folder))
        if baseline is not None and baseline not in figures:
            raise RunFolderError(
                f"{folder} has no figures of an arm {baseline!r} to compare with; there are {', '.join(figures)}"
            )
        comparison = compare(figures, scenario.claims, baseline=baseline)
        summary["comparison"] = comparison.to_record()
        pictures = draw_comparison(
            comparison,
            scenario.report.curves or (() if baseline is None else CURVE_AXES),
            scenario.report.bars,
            loss_unit=summary["loss_unit"],
        )
        save_pictures(pictures, out)
        section = comparison_section(comparison, pictures)
    write_summary(summary, out)
    write_report(
        out / REPORT_FILE,
        title=scenario.title,
        summary=summary,
        arms=arms,
        comparison=section,
        configuration_text=(folder / SCENARIO_FILE).read_text(),
        versions=made_with,
        edges=_read_edges(scenario, folder, arms),
        topology=build_topology(shown.topology or scenario.topology, scenario.sites_of(shown)),
    )
    if comparison is not None and not missing:
        facts = [
            f"seeds {', '.join(map(str, scenario.seeds))}; {scenario.training.num_steps} steps",
            *changes,
        ]
        text = markdown(comparison, heading=scenario.title, facts=facts)
        write_whole(out / RESULT_FILE, text.encode())
    tables = [table(summary)]
    if comparison is not None:
        tables = [arms_table(comparison), *([claims_table(comparison)] if comparison.settled else [])]
    tell(tables, [*missing, *changes], out, stream)


def _folders(scenario: ScenarioConfig, folder: Path) -> dict[tuple[str, int], Path]:
    """Where the sites of each arm have their folders under each seed."""
    return {(job.arm.name, job.seed): folder / job.run for job in make_jobs(scenario)}


def _report_synthetic(
    scenario: ScenarioConfig,
    folder: Path,
    stream: TextIO,
    out: Path,
    baseline: str | None,
    is_partial: bool,
) -> None:
    from p2pcodistill.report.synthetic_html import write_synthetic_report

    if baseline is not None:
        raise RunFolderError(f"{folder} is a run without training, which has no baseline: leave it out")
    jobs = make_jobs(scenario)
    paths = [folder / job.run / SYNTHETIC_RESULT_FILE for job in jobs]
    missing = [
        f"{job.arm.name}, seed {job.seed}: not finished"
        for job, path in zip(jobs, paths, strict=True)
        if not path.exists()
    ]
    if is_partial and len(missing) == len(paths):
        raise RunFolderError(f"nothing in {folder} has finished yet: wait for its first seed")
    results = [
        SyntheticResult.from_json(path.read_text()) for path in paths if path.exists() or not is_partial
    ]
    summary = summarise_synthetic(scenario.name, results)
    write_summary(summary, out)
    write_synthetic_report(
        out / REPORT_FILE,
        title=f"{scenario.title} ({'; '.join(missing)})" if missing else scenario.title,
        summary=summary,
        result=results[0],
        topology=build_topology(scenario.topology, scenario.site_names),
        configuration_text=(folder / SCENARIO_FILE).read_text(),
        versions=read_run_record(folder),
    )
    tell([synthetic_table(summary)], [*missing, *describe_changes(folder)], out, stream)


def loss_unit_of(scenario: ScenarioConfig) -> str:
    """What held-out losses are counted in."""
    return loss_unit_of_task(scenario.task, has_pieces=scenario.data.vocabulary_size is not None)


def _read_edges(scenario: ScenarioConfig, folder: Path, arms: Sequence[ArmResult]) -> EdgeResults | None:
    """What happened between the sites of the first codistilled one of `arms`; None if there is none."""
    from p2pcodistill.report.edges import EdgeResults

    first = next(((arm.name, arm.seed) for arm in arms if arm.kind == "codistilled"), None)
    job = next((job for job in make_jobs(scenario) if (job.arm.name, job.seed) == first), None)
    if job is None:
        return None
    return EdgeResults.of(
        {place.site: _read_records(job, place, folder) for place in node_files(job, folder)}
    )


def read_results(scenario: ScenarioConfig, folder: Path, *, is_partial: bool = False) -> list[ArmResult]:
    """What each arm came to under each seed, in the scenario's order, from the event logs.

    Raises GroupError when a site has not finished its training that no fault has taken away; with `is_partial`, its arm is
    marked as not finished instead.
    """
    arms: dict[str, ArmResult] = {}
    for job in make_jobs(scenario):
        arm = arms.setdefault(job.run, ArmResult(job.arm.name, job.arm.kind, job.seed, {}))
        for place in node_files(job, folder):
            history = SiteHistory.of(_read_records(job, place, folder))
            arm.sites[place.site] = history
            if not history.finished and place.site in expected_to_finish(job, scenario):
                if not is_partial:
                    raise GroupError(failure(job, place, "ended before its training was finished"))
                arms[job.run] = replace(arms[job.run], is_finished=False)
    return list(arms.values())


def unfinished(scenario: ScenarioConfig, results: Sequence[ArmResult]) -> list[str]:
    """What there is to say of each arm and seed that has not finished."""
    num_steps = {arm.name: scenario.training_of(arm).num_steps for arm in scenario.arms}
    told = []
    for arm in results:
        if arm.is_finished:
            continue
        steps = min(history.num_steps for history in arm.sites.values())
        if any(history.evaluations for history in arm.sites.values()):
            state = f"not finished, at step {steps} of {num_steps[arm.name]}"
        else:
            state = (
                "not evaluated yet"
                if any(h.num_group_starts or h.num_steps for h in arm.sites.values())
                else "not begun"
            )
        told.append(f"{arm.name}, seed {arm.seed}: {state}")
    return told


def evaluated(scenario: ScenarioConfig, results: Sequence[ArmResult], folder: Path) -> list[ArmResult]:
    """Those of `results` that there is something to say of. Raises RunFolderError if there are none."""
    arms = [arm for arm in results if any(history.evaluations for history in arm.sites.values())]
    if not arms:
        raise RunFolderError(
            f"nothing in {folder} has been evaluated yet: wait for step {scenario.training.evaluation_interval_steps}, "
            "the first at which something is (training.evaluation_interval_steps)"
        )
    return arms


def _read_records(job: Job, place: NodeFiles, folder: Path) -> list[Record]:
    """What a site told of itself, then what the simulator told of it."""
    told = [r for r in EventTail(simulator_events(job, folder)).read() if r.get("site") == place.site]
    return [*put_right(EventTail(place.events).read(), told), *told]
