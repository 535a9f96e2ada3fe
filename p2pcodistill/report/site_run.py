"""The run folder of a single site, as `p2pcodistill node` leaves it: read back, and reported on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from p2pcodistill.config import CodistillationConfig, FramesConfig, TrainingConfig
from p2pcodistill.errors import ConfigError, RunFolderError
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.recorded import HeldOut, RecordedRun, labels_digest, loss_unit_of_task, settings_of
from p2pcodistill.report.results import REPORT_FILE, tell, write_summary
from p2pcodistill.report.summary import ArmResult, summarise
from p2pcodistill.report.table import table
from p2pcodistill.runfolder import CONFIG_FILE, EVENTS_FILE, PREDICTIONS_FILE
from p2pcodistill.strict import StrictModel, parse_model
from p2pcodistill.task_configs import TaskConfig


class _Description(StrictModel):
    """What `SitePlan.describe` says of a run."""

    run: str
    name: str
    members: dict[str, str]
    topology: str
    task: TaskConfig
    training: TrainingConfig
    codistillation: CodistillationConfig
    frames: FramesConfig
    group: dict[str, Any]


def is_site_run(folder: Path) -> bool:
    """Whether a node has run in `folder`."""
    return (folder / CONFIG_FILE).exists()


def read_site_run(folder: Path, name: str) -> RecordedRun:
    """What a node and its group have left in `folder`, as a run of one arm that is called after the site.

    Raises RunFolderError where the folder is of another version, or nothing has been evaluated yet.
    """
    path = folder / CONFIG_FILE
    text = path.read_text()
    try:
        described = parse_model(_Description, json.loads(text), source=str(path))
    except (ValueError, ConfigError) as error:
        raise RunFolderError(
            f"this p2pcodistill cannot read {folder}, which another version has written, or which is damaged: {error}"
        ) from None
    history = SiteHistory.read(folder / EVENTS_FILE)
    if not history.evaluations:
        raise RunFolderError(
            f"nothing in {folder} has been evaluated yet: wait for step "
            f"{described.training.evaluation_interval_steps}, the first at which something is "
            "(training.evaluation_interval_steps)"
        )
    num_steps = described.training.num_steps
    told = f"{described.name}: not finished, at step {history.num_steps} of {num_steps}"
    kind = "codistilled" if len(described.members) > 1 else "alone"
    settings = settings_of(described.model_dump(mode="json", exclude={"name", "run", "members"}))
    return RecordedRun(
        name=name,
        folder=folder,
        kind="site",
        results=[
            ArmResult(
                described.name, kind, described.training.seed, {described.name: history}, history.finished
            )
        ],
        unfinished=[] if history.finished else [told],
        num_steps=num_steps,
        loss_unit=loss_unit_of_task(described.task),
        task=described.task.name,
        clock="wall clock",
        held_out=HeldOut(
            None,
            labels_digest([folder / PREDICTIONS_FILE]),
            json.dumps([described.task.model_dump(mode="json", include={"data", "held_out"})]),
        ),
        settings=settings,
        configuration_text=text,
    )


def report_site(run: RecordedRun, out: Path, stream: TextIO) -> None:
    """Write summary and report of a site's run into `out`; print its table."""
    from p2pcodistill.report.html import write_report  # late: drawing takes a second to import

    summary = summarise(run.name, run.results, run.num_steps, loss_unit=run.loss_unit, is_compared=False)
    write_summary(summary, out)
    write_report(
        out / REPORT_FILE,
        title=run.name,
        summary=summary,
        arms=run.results,
        configuration_text=run.configuration_text,
        versions={},
    )
    tell([table(summary)], run.unfinished, out, stream)
