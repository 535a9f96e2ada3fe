"""Which jobs a scenario needs, in which order they start, and how many threads each gets. Pure functions.

A job is what must run at the same time: all sites of an arm whose sites have to do with each other, or a single site. In
virtual time it is one process. Jobs are placed on the cores by list scheduling, widest and then longest first. The number
of threads is part of the plan, from estimated durations, so that two runs on machines with equally many cores compute the
same.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2pcodistill.config import TrainingConfig
from p2pcodistill.simulation.arm_config import ArmConfig
from p2pcodistill.simulation.arms.kinds import POOLED_SITE
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.topology.build import build_topology

MAX_PLANNED_THREADS = 4
# A teacher's forward pass, as a share of the student's whole step.
_TEACHER_COST = 1 / 3


@dataclass(frozen=True, slots=True)
class SiteRun:
    """One node process: a site in one arm under one seed.

    `shards` are the sites whose text it trains on.
    """

    name: str
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """Sites that run at the same time. `cost` is its estimated duration, in steps of a lone site as unit.

    `is_one_process`: all sites share a process, and its threads.
    """

    arm: ArmConfig
    seed: int
    sites: tuple[SiteRun, ...]
    num_ranks_per_site: int
    num_threads: int
    cost: float
    is_one_process: bool = False

    @property
    def run(self) -> str:
        """Names the arm's folder, and the run that its nodes belong to."""
        return f"{self.arm.name}-seed{self.seed}"

    @property
    def name(self) -> str:
        """Distinguishes it from the other jobs of its scenario."""
        return f"{self.run}/{self.sites[0].name}" if self.arm.of_kind.sites == "apart" else self.run

    @property
    def num_processes(self) -> int:
        """Processes that train."""
        return 1 if self.is_one_process else self.num_ranks_per_site * len(self.sites)

    @property
    def num_cores(self) -> int:
        """Cores that the job keeps busy."""
        return self.num_processes * self.num_threads


def make_jobs(scenario: ScenarioConfig) -> list[Job]:
    """All jobs of `scenario`, in the order of its seeds and arms.

    A lone site has exactly the name (hence the initialisation and order) and the data that it has in a codistilled arm.
    """
    jobs = []
    for seed in scenario.seeds:
        for arm in scenario.arms:
            names = scenario.sites_of(arm)
            sites = tuple(SiteRun(name, scenario.shards_of(arm, name)) for name in names)
            match arm.of_kind.sites:
                case "together":
                    parts = [sites]
                case "apart":
                    parts = [(site,) for site in sites]
                case "one":
                    parts = [(SiteRun(POOLED_SITE, scenario.pool_of(arm)),)]
            cost = _cost(scenario, arm)
            jobs += [
                Job(
                    arm,
                    seed,
                    part,
                    scenario.group.num_ranks,
                    scenario.group.num_threads,
                    cost,
                    is_one_process=scenario.mode == "virtual",
                )
                for part in parts
            ]
    return jobs


def _cost(scenario: ScenarioConfig, arm: ArmConfig) -> float:
    if scenario.synthetic is not None:  # nothing is trained, and all jobs are alike
        return 1.0
    names = scenario.sites_of(arm)
    num_steps = scenario.training_of(arm).num_steps
    match arm.kind:
        case "codistilled":
            topology = build_topology(arm.topology or scenario.topology, names)
            schedules = [topology.schedule_of(name) for name in names]
            num_teachers = [sum(map(len, tables)) / len(tables) for tables in schedules]
            # One process trains a site after the other.
            per_step = (sum if scenario.mode == "virtual" else max)(
                1 + _TEACHER_COST * n for n in num_teachers
            )
            return num_steps * (arm.num_workers or 1) * per_step
        case "alone" | "pooled":
            return float(num_steps * (arm.num_workers or 1))
        case "synchronous" | "asynchronous":
            return float(num_steps * (arm.num_workers or len(names)))
        case "ensemble":
            return float(num_steps * (arm.num_members or len(names)))
        case "two-phase":
            num_members = arm.num_members or len(names)
            teacher_steps = arm.teacher_steps or num_steps
            return num_members * teacher_steps + num_steps * (1 + _TEACHER_COST * num_members)
        case "fedavg" | "diloco" | "gossip-averaging":
            return float(num_steps * len(names))


def seeded_training(training: TrainingConfig, arm: ArmConfig, seed: int) -> TrainingConfig:
    """`training` of the arm under one seed of the scenario. Each site then makes its own of it (`TrainingConfig.of_site`).

    Where a site has several workers but one model, its batch is that of all.
    """
    initialisation = arm.initialisation or ("same" if arm.of_kind.starts_alike else None)
    initialisation_seed = training.initialisation_seed
    if initialisation == "same" and initialisation_seed is None:
        initialisation_seed = seed
    elif initialisation == "different":
        initialisation_seed = None
    num_workers = arm.num_workers if arm.of_kind.module is None and arm.num_workers is not None else 1
    return training.model_copy(
        update={
            "seed": seed,
            "initialisation_seed": initialisation_seed,
            "batch_size": training.batch_size * num_workers,
        }
    )


def startable(waiting: Sequence[Job], *, num_free_cores: int, num_cores: int) -> list[Job]:
    """The jobs of `waiting` that start now, in its order: each that fits into the cores that are free.

    A job that needs more cores than the machine has starts once all `num_cores` are free.
    """
    chosen = []
    for job in waiting:
        num_needed = min(job.num_cores, num_cores)
        if num_needed <= num_free_cores:
            chosen.append(job)
            num_free_cores -= num_needed
    return chosen


def plan(jobs: Sequence[Job], *, num_cores: int, widen: bool) -> list[Job]:
    """`jobs` in the order in which they should start.

    With `widen`, the jobs that start last get the threads for which cores would otherwise be idle, evenly and at most
    `MAX_PLANNED_THREADS` a process. Jobs of one process get more than one only where there are fewer jobs than cores: one
    that waits for two free cores leaves one idle. `num_cores` is at least 1.
    """
    # Pooled jobs last among equals: they may get more threads, while a lone site then computes as its codistilled self does.
    waiting = sorted(
        jobs, key=lambda job: (-min(job.num_cores, num_cores), -job.cost, job.arm.kind == "pooled")
    )
    if not widen or (len(jobs) >= num_cores and all(job.is_one_process for job in jobs)):
        return waiting
    planned: list[Job] = []
    running: list[tuple[float, int]] = []  # a heap of (estimated end, cores)
    now, num_free_cores = 0.0, num_cores
    while waiting:
        starting = startable(waiting, num_free_cores=num_free_cores, num_cores=num_cores)
        if len(starting) == len(waiting):
            num_spare = num_free_cores - sum(min(job.num_cores, num_cores) for job in starting)
            num_more = min(MAX_PLANNED_THREADS - 1, num_spare // sum(job.num_processes for job in starting))
            return planned + [replace(job, num_threads=job.num_threads + num_more) for job in starting]
        for job in starting:
            waiting.remove(job)
            heapq.heappush(running, (now + job.cost, min(job.num_cores, num_cores)))
            num_free_cores -= min(job.num_cores, num_cores)
        planned += starting
        now = running[0][0]
        while running and running[0][0] <= now:
            num_free_cores += heapq.heappop(running)[1]
    return planned
