"""The run folder of a simulation, read back as one of several runs that are compared."""

from __future__ import annotations

import json
from pathlib import Path

from p2pcodistill.errors import RunFolderError, UserError
from p2pcodistill.report.recorded import HeldOut, RecordedRun, digest_of, labels_digest, settings_of
from p2pcodistill.runfolder import PREDICTIONS_FILE
from p2pcodistill.simulation.data import evaluation_files
from p2pcodistill.simulation.files import SCENARIO_FILE, node_files
from p2pcodistill.simulation.jobs import make_jobs
from p2pcodistill.simulation.outcome import evaluated, loss_unit_of, read_results, unfinished
from p2pcodistill.simulation.run_record import read_run_record
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.simulation.search import SEARCH_FOLDER

_NO_SETTINGS = {
    "name",
    "description",
    "sites",
    "arms",
    "seeds",
    "report",
    "claims",
    "search",
    "links",
    "faults",
}
_ARM_SETTINGS = {"name", "kind"}


def load_recorded_scenario(folder: Path) -> ScenarioConfig:
    """The scenario that ran in `folder`.

    Raises RunFolderError for one of another format or version, or whose settings are still to be searched.
    """
    read_run_record(folder)
    try:
        scenario = load_scenario(folder / SCENARIO_FILE)
    except UserError as error:
        raise RunFolderError(
            f"this p2pcodistill cannot read {folder}, which another version has written, or which is damaged: {error}"
        ) from None
    if scenario.search is not None:
        raise RunFolderError(
            f"settings of {folder} are still to be searched: let it go on, or report on its trials, {folder / SEARCH_FOLDER}"
        )
    return scenario


def read_scenario_run(folder: Path, name: str) -> RecordedRun:
    """What the simulation in `folder` has left so far.

    Raises RunFolderError where nothing was trained or evaluated, or the folder is of another format or version.
    """
    scenario = load_recorded_scenario(folder)
    if scenario.synthetic is not None:
        raise RunFolderError(
            f"{folder} is a run without training ([synthetic]), whose losses nothing can be compared with: leave it out"
        )
    results = read_results(scenario, folder, is_partial=True)
    return RecordedRun(
        name=name,
        folder=folder,
        kind="scenario",
        results=evaluated(scenario, results, folder),
        unfinished=unfinished(scenario, results),
        num_steps=scenario.training.num_steps,
        loss_unit=loss_unit_of(scenario),
        task=scenario.task.name,
        clock="virtual" if scenario.mode == "virtual" else "wall clock",
        held_out=_held_out(scenario, folder),
        settings=_settings(scenario) | {f"made with {key}": v for key, v in read_run_record(folder).items()},
        configuration_text=(folder / SCENARIO_FILE).read_text(),
    )


def _held_out(scenario: ScenarioConfig, folder: Path) -> HeldOut:
    texts = [path.read_bytes() for path in evaluation_files(folder)]
    places = [place for job in make_jobs(scenario) for place in node_files(job, folder)]
    source = [
        scenario.data.model_dump(mode="json"),
        scenario.task.model_dump(mode="json"),
        len(scenario.sites),  # what is split off may depend on it
    ]
    labels = labels_digest([place.run_folder / PREDICTIONS_FILE for place in places])
    return HeldOut(digest_of(*texts) if texts else None, labels, json.dumps(source))


def _settings(scenario: ScenarioConfig) -> dict[str, str]:
    """All of a scenario but what says how it is shown, and what makes up its arms."""
    table = scenario.model_dump(mode="json", exclude=_NO_SETTINGS)
    table["data"] |= {"sites": [site.name for site in scenario.sites]}
    for section in ("links", "faults"):
        table[section] = [
            entry.model_dump(mode="json", exclude_unset=True) for entry in getattr(scenario, section)
        ]
    table["arms"] = {
        arm.name: arm.model_dump(mode="json", exclude=_ARM_SETTINGS, exclude_unset=True)
        for arm in scenario.arms
    }
    return settings_of(table)
