"""What happens when a job begins, tells of itself and ends: it is shown, and what has finished is entered."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from p2pcodistill.report.live import View
from p2pcodistill.report.run_progress import JobProgress, RunProgress
from p2pcodistill.simulation.finished import FinishedJobs
from p2pcodistill.simulation.jobs import Job
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.telemetry.records import Record
from p2pcodistill.telemetry.simulation_events import SyntheticMeasured
from p2pcodistill.telemetry.training_events import StepMeasured, TrainingEnded, TrainingStarted

_STEP_EVENTS = frozenset(
    event.name for event in (TrainingStarted, StepMeasured, TrainingEnded, SyntheticMeasured)
)


class JobWatch:
    """Follows the jobs of one scenario in its run folder. `stage` are those of `progress` that stand for them, by name."""

    def __init__(
        self,
        scenario: ScenarioConfig,
        stage: Mapping[str, JobProgress],
        *,
        progress: RunProgress,
        finished: FinishedJobs,
        view: View,
    ) -> None:
        self._scenario, self._stage = scenario, stage
        self._progress, self._finished, self._view = progress, finished, view
        self._begun_s: dict[str, float] = {}
        view.show_jobs(progress)

    def begin(self, job: Job) -> None:
        """`job` is about to start."""
        self._begun_s[job.name] = time.monotonic()
        self._progress.begin(self._stage[job.name])
        self._view.show_jobs(self._progress)

    def note(self, job: Job, site: str, record: Record) -> None:
        """`site` of `job` told this."""
        if record.get("event") in _STEP_EVENTS:
            step = record.get("step", record.get("start_step"))
            if isinstance(step, int):
                self._progress.advance(self._stage[job.name], site, step, record.get("num_steps"))
        self._view.update(group_of(job, self._scenario), site, record)

    def end(self, job: Job) -> None:
        """`job` has ended, and was not stopped. Raises GroupError when its training was not finished."""
        duration_s = time.monotonic() - self._begun_s[job.name]
        self._progress.end(self._stage[job.name], duration_s)
        self._finished.add(job, duration_s)
        self._view.show_jobs(self._progress)


def group_of(job: Job, scenario: ScenarioConfig) -> str:
    """Under which name its sites are shown."""
    return job.arm.name if len(scenario.seeds) == 1 else f"{job.arm.name} seed {job.seed}"


def stage_of(jobs: Sequence[Job], scenario: ScenarioConfig) -> dict[str, JobProgress]:
    """The progress of `jobs`, none of which has begun, by name."""
    return {job.name: _progress_of(job, scenario) for job in jobs}


def _progress_of(job: Job, scenario: ScenarioConfig) -> JobProgress:
    group = group_of(job, scenario)
    is_apart = job.arm.of_kind.sites == "apart"
    return JobProgress(
        group=group,
        kinds=(job.arm.name, job.arm.kind),
        cost=job.cost,
        num_cores=job.num_cores,
        num_sites=1 if scenario.synthetic is not None else len(job.sites),
        title=f"{group}, {job.sites[0].name}" if is_apart else group,
    )
