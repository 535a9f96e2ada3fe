"""What a kind of arm is given to run with, and the one way to run it.

A kind is a module of this package with a function `run(arm)`. It makes learners, advances them, lets them exchange what the
kind is about in between, and counts what that would be on the wire. Logs of sites, in the run folder, are all that it
leaves.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from p2pcodistill.codistill.exchange import MemoryBoard
from p2pcodistill.config import CodistillationConfig, TrainingConfig
from p2pcodistill.simulation.arms.kinds import POOLED_SITE
from p2pcodistill.simulation.arms.learner import Learner, Tell
from p2pcodistill.simulation.data import task_of_site
from p2pcodistill.simulation.files import NodeFiles
from p2pcodistill.simulation.jobs import Job, seeded_training
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.simulation.virtual.logs import VirtualLogs
from p2pcodistill.simulation.virtual.specs import spec_of
from p2pcodistill.simulation.virtual.step_time import StepTimes
from p2pcodistill.telemetry.event import Event
from p2pcodistill.topology.build import build_topology


class ArmModule(Protocol):
    """A kind of arm."""

    def run(self, arm: ArmRun) -> None:
        """Run `arm` to its end."""


class ArmRun:
    """One arm under one seed: `scenario` as the arm wants it, `places` of the sites that have a log."""

    def __init__(
        self,
        job: Job,
        scenario: ScenarioConfig,
        folder: Path,
        places: Mapping[str, NodeFiles],
        logs: VirtualLogs,
    ) -> None:
        self.config = job.arm
        self.scenario = scenario.of_arm(job.arm)
        self.sites = scenario.sites_of(job.arm)
        self.topology = build_topology(self.scenario.topology, self.sites)
        self.training: TrainingConfig = seeded_training(self.scenario.training, job.arm, job.seed)
        self.step_times = StepTimes(self.scenario.virtual, seed=job.seed)
        self._folder, self._places, self._logs = folder, places, logs

    @property
    def interval_steps(self) -> int:
        """Local steps between two exchanges."""
        return self.config.interval_steps or self.scenario.codistillation.exchange_interval_steps

    @property
    def folder(self) -> Path:
        """The run folder of the one site of an arm that has one for all."""
        return self._places[POOLED_SITE].run_folder

    def tell(self, site: str = POOLED_SITE) -> Tell:
        """Where the events of a site with a log go."""
        path = self._places[site].events
        return lambda time_s, event: self._logs.write(path, time_s, event)

    def learner(
        self,
        site: str,
        *,
        name: str | None = None,
        is_lead: bool = False,
        tell: Tell | None = None,
        num_workers: int = 1,
        share: tuple[int, int] = (0, 1),
        teachers: Mapping[str, float] | None = None,
        board: MemoryBoard | None = None,
        codistillation: CodistillationConfig | None = None,
        now_s: float = 0.0,
        **training: Any,
    ) -> Learner:
        """A learner with the data of `site` (see `ScenarioConfig.shards_of`), called `name` where a site has several, each
        with its `share` of that data, in the order that is the site's.

        Of an arm that has one site for all, the lead's model is what it leaves. Events go to `tell`, by default to the log
        of a site that has one, else nowhere. `training` are keys of `[training]` that it has otherwise. For the rest, see
        `Learner`.
        """
        name = name or site
        place = self._places.get(site) or self._places[POOLED_SITE]
        spec = spec_of(place)
        has_place = is_lead or place.site == site
        folder = place.run_folder if has_place else place.run_folder / "workers" / name
        (folder / "training").mkdir(parents=True, exist_ok=True)
        shards = self.scenario.shards_of(self.config, site)
        task = task_of_site(self.scenario, shards, self._folder, Path("..", ".."))
        # There is no going on with an arm that was stopped: one checkpoint, in the end, is enough.
        training = {"checkpoint_interval_steps": self.training.num_steps} | training
        spec = spec.model_copy(
            update={
                "site": name,
                "training_folder": folder / "training",
                "model_path": folder / "model.safetensors",
                "task": task.located_in(place.node_file.parent),
                "training": self.training.of_site(site if share[1] > 1 else name).model_copy(update=training),
                "codistillation": codistillation or spec.codistillation,
            }
        )
        tell = tell or (self.tell(site) if site in self._places else _tell_nobody)
        return Learner(
            name,
            spec,
            tell,
            self.step_times,
            num_workers=num_workers,
            share=share,
            teachers=teachers,
            board=board,
            now_s=now_s,
        )


def _tell_nobody(_time_s: float, _event: Event) -> None:
    pass


def run_arm(arm: ArmRun) -> None:
    """Run an arm of a kind that has a module."""
    name = arm.config.of_kind.module
    assert name is not None, "nodes, or copies of them, run the others"
    module: ArmModule = importlib.import_module(f"p2pcodistill.simulation.arms.{name}")
    module.run(arm)
