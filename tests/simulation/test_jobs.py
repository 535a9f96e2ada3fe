"""Which jobs a scenario needs and how they meet the cores: pure functions, checked against a model of the machine."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.simulation.arm_config import ArmConfig
from p2pcodistill.simulation.jobs import (
    MAX_PLANNED_THREADS,
    Job,
    SiteRun,
    make_jobs,
    plan,
    startable,
)
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.strict import parse_model


def scenario(**changes: Any) -> ScenarioConfig:
    table = {
        "name": "three",
        "sites": [{"name": "a"}, {"name": "b"}, {"name": "c"}],
        "arms": [{"name": kind, "kind": kind} for kind in ("pooled", "alone", "codistilled")],
    }
    return parse_model(ScenarioConfig, table | changes, source="test")


def test_a_lone_site_is_the_codistilled_one_without_peers() -> None:
    jobs = make_jobs(scenario(seeds=[3, 4]))
    assert [(job.seed, job.arm.name, len(job.sites)) for job in jobs] == [
        (seed, *rest) for seed in (3, 4) for rest in [("pooled", 1), *[("alone", 1)] * 3, ("codistilled", 3)]
    ]
    for seed in (3, 4):
        of_seed = [job for job in jobs if job.seed == seed]
        (together,) = [job.sites for job in of_seed if job.arm.kind == "codistilled"]
        assert together == tuple(job.sites[0] for job in of_seed if job.arm.kind == "alone")
        (pooled,) = [job.sites[0] for job in of_seed if job.arm.kind == "pooled"]
        assert pooled == SiteRun("pooled", ("a", "b", "c"))
        assert [site.shards for site in together] == [("a",), ("b",), ("c",)]


def test_cost_grows_with_teachers_and_cores_with_ranks() -> None:
    full = {job.arm.kind: job for job in make_jobs(scenario(group={"num_ranks": 2}))}
    assert full["codistilled"].num_cores == 6
    assert full["alone"].num_cores == full["pooled"].num_cores == 2
    assert full["codistilled"].cost > full["alone"].cost == full["pooled"].cost


def test_an_arm_of_some_of_the_sites_leaves_each_the_data_that_it_has_in_others() -> None:
    kinds = ["codistilled", "alone", "pooled", "fedavg"]
    arms = [{"name": kind, "kind": kind, "num_sites": 2} for kind in kinds]
    jobs = make_jobs(scenario(mode="virtual", arms=arms))
    a, b = SiteRun("a", ("a",)), SiteRun("b", ("b",))
    assert [job.sites for job in jobs] == [(a, b), (a,), (b,), (SiteRun("pooled", ("a", "b")),), (a, b)]
    same = {"name": "same", "kind": "codistilled", "num_sites": 2, "sharing": "same"}
    (job,) = make_jobs(scenario(mode="virtual", arms=[same]))
    assert [site.shards for site in job.sites] == [("a", "b"), ("a", "b")]


def demo(num_cores: int, **changes: Any) -> list[tuple[str, int]]:
    jobs = make_jobs(scenario(sites=[{"name": "a"}, {"name": "b"}], **changes))
    return [(job.arm.name, job.num_threads) for job in plan(jobs, num_cores=num_cores, widen=True)]


def test_the_last_jobs_get_the_cores_that_would_be_idle() -> None:
    one_thread_each = [("codistilled", 1), ("alone", 1), ("alone", 1), ("pooled", 1)]
    assert demo(1) == one_thread_each
    assert demo(2) == demo(3) == [*one_thread_each[:-1], ("pooled", 2)]
    assert demo(5) == one_thread_each
    assert demo(10) == [(name, 2) for name, _ in one_thread_each]
    assert demo(64) == [(name, MAX_PLANNED_THREADS) for name, _ in one_thread_each]


def test_without_widening_every_job_keeps_its_threads() -> None:
    jobs = make_jobs(scenario(group={"num_threads": 2}))
    planned = plan(jobs, num_cores=64, widen=False)
    assert [job.num_threads for job in planned] == [2] * len(jobs)
    assert planned[0].arm.kind == "codistilled"


def test_a_job_wider_than_the_machine_has_it_to_itself() -> None:
    wide, narrow = make_jobs(scenario())[-1], make_jobs(scenario())[0]
    assert startable([wide, narrow], num_free_cores=2, num_cores=2) == [wide]
    assert startable([wide, narrow], num_free_cores=1, num_cores=2) == [narrow]
    assert startable([wide], num_free_cores=-1, num_cores=2) == []


JOBS = st.lists(
    st.builds(
        lambda index, num_sites, num_ranks, cost: Job(
            arm=ArmConfig(name=f"arm{index}", kind="codistilled"),
            seed=index,
            sites=tuple(SiteRun(f"s{n}", (f"s{n}",)) for n in range(num_sites)),
            num_ranks_per_site=num_ranks,
            num_threads=1,
            cost=cost,
        ),
        st.integers(0, 10**6),
        st.integers(1, 4),
        st.integers(1, 2),
        st.sampled_from([1.0, 1.25, 2.0]),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda job: job.seed,
)


@given(jobs=JOBS, num_cores=st.integers(1, 12), widen=st.booleans(), data=st.data())
def test_whatever_the_durations_all_jobs_run_and_cores_are_never_shared(
    jobs: list[Job], num_cores: int, widen: bool, data: st.DataObject
) -> None:
    waiting = plan(jobs, num_cores=num_cores, widen=widen)
    assert waiting == plan(jobs, num_cores=num_cores, widen=widen)
    assert sorted(job.seed for job in waiting) == sorted(job.seed for job in jobs)
    assert all(1 <= job.num_threads <= MAX_PLANNED_THREADS for job in waiting)
    assert all(job.num_cores <= num_cores for job in waiting if job.num_threads > 1)
    running: list[Job] = []
    while waiting or running:
        num_free = num_cores - sum(job.num_cores for job in running)
        for job in startable(waiting, num_free_cores=num_free, num_cores=num_cores):
            waiting.remove(job)
            running.append(job)
        assert running, "nothing runs although jobs wait"
        assert len(running) == 1 or sum(job.num_cores for job in running) <= num_cores
        running.pop(data.draw(st.integers(0, len(running) - 1)))


@pytest.mark.parametrize("num_cores", [1, 2, 3, 5, 8])
def test_a_core_is_idle_only_when_no_waiting_job_fits(num_cores: int) -> None:
    waiting = make_jobs(scenario(seeds=[0, 1]))
    started = startable(waiting, num_free_cores=num_cores, num_cores=num_cores)
    num_free = num_cores - sum(min(job.num_cores, num_cores) for job in started)
    rest = [job for job in waiting if job not in started]
    assert all(min(job.num_cores, num_cores) > num_free for job in rest)
