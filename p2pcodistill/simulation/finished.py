"""Which jobs of a run folder have finished: `jobs.json`, written when one ends, read when a simulation goes on.

    {"scenario": digest of scenario.toml, "finished": {job: {"duration_s": 12.3, "files": {"relative path": bytes}}}}

`duration_s` is the time that it ran since its last start. A job that is in there, and whose files are there in that size, is
not run again. It is entered after its sites' training has ended and its files are on the disk, so that a folder alone means
nothing. Its files are those that the report needs: logs and predictions. Models, which are large, may be removed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from p2pcodistill.checkpoint.durable import sync, write_durably
from p2pcodistill.errors import GroupError, RunFolderError
from p2pcodistill.runfolder import PREDICTIONS_FILE
from p2pcodistill.simulation.files import SCENARIO_FILE, NodeFiles, node_files, simulator_events
from p2pcodistill.simulation.job_run import expected_to_finish, failure
from p2pcodistill.simulation.jobs import Job
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.simulation.synthetic_config import RESULT_FILE
from p2pcodistill.telemetry.log import EventTail
from p2pcodistill.telemetry.training_events import TrainingEnded, TrainingStarted

JOBS_FILE = "jobs.json"


class FinishedJobs:
    """The jobs of the scenario in the run folder `folder` that have finished."""

    def __init__(self, scenario: ScenarioConfig, folder: Path) -> None:
        """Raises RunFolderError where they are not of this scenario, or cannot be read."""
        self._scenario, self._folder = scenario, folder
        digest = hashlib.sha256((folder / SCENARIO_FILE).read_bytes()).hexdigest()
        self._record: dict[str, Any] = {"scenario": digest, "finished": {}}
        path = folder / JOBS_FILE
        if not path.exists():
            return
        try:
            self._record = json.loads(path.read_bytes())
            was = self._record["scenario"]
            for entry in self._record["finished"].values():
                _check_entry(entry)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunFolderError(f"{path} is damaged: remove it, and all jobs run again") from None
        if was != digest:
            raise RunFolderError(
                f"{folder / SCENARIO_FILE} was changed since the simulation began: restore it, or run it anew with "
                f"p2pcodistill simulate {folder / SCENARIO_FILE}"
            )

    def duration_s(self, job: Job) -> float | None:
        """How long the job ran since its last start; None where it has not finished, or something is missing."""
        entry = self._record["finished"].get(job.name)
        if entry is None or any(self._size(path) != size for path, size in entry["files"].items()):
            return None
        return float(entry["duration_s"])

    def add(self, job: Job, duration_s: float) -> None:
        """Enter a job whose processes have ended. Raises GroupError when its training was not finished."""
        if self._scenario.synthetic is None:
            self._require_end(job)
        files = {path: size for path in self._results(job) if (size := self._size(path)) is not None}
        for path in files:
            sync(self._folder / path)
        self._record["finished"][job.name] = {"duration_s": round(duration_s, 3), "files": files}
        write_durably(self._folder / JOBS_FILE, (json.dumps(self._record, indent=2) + "\n").encode())

    def _require_end(self, job: Job) -> None:
        expected = expected_to_finish(job, self._scenario)
        for place in node_files(job, self._folder):
            if place.site in expected and not _has_finished(place):
                raise GroupError(failure(job, place, "ended before its training was finished"))

    def _results(self, job: Job) -> list[str]:
        """All that the report is made from, relative to the run folder."""
        paths = [simulator_events(job, self._folder), self._folder / job.run / RESULT_FILE]
        for place in node_files(job, self._folder):
            paths += [place.events, place.run_folder / PREDICTIONS_FILE]
        return [path.relative_to(self._folder).as_posix() for path in paths]

    def _size(self, path: str) -> int | None:
        try:
            return (self._folder / path).stat().st_size
        except FileNotFoundError:
            return None


def _check_entry(entry: Any) -> None:
    """Raise one of ValueError, KeyError, TypeError, AttributeError for a damaged entry of a job."""
    sizes = entry["files"].values()
    if not isinstance(entry["duration_s"], int | float) or not all(isinstance(size, int) for size in sizes):
        raise TypeError


def _has_finished(place: NodeFiles) -> bool:
    finished = False
    for record in EventTail(place.events).read():
        if record.get("event") == TrainingStarted.name:
            finished = False
        elif record.get("event") == TrainingEnded.name:
            finished = bool(record.get("finished"))
    return finished
