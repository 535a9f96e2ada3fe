"""How far the jobs of a simulation are, and the estimate of what the rest takes."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.report.plain import PlainView
from p2pcodistill.report.run_progress import JobProgress, RunProgress, about
from p2pcodistill.report.screen import screen
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.telemetry.training_events import StepMeasured


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def job(name: str, cost: float = 100.0, **changes: Any) -> JobProgress:
    described = {"kinds": (name.split()[0],), "num_cores": 1, "num_sites": 1, "title": name, "group": name}
    return JobProgress(cost=cost, **described | changes)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_estimated_before_there_is_something_to_go_by(clock: Clock) -> None:
    jobs = [job("alone"), job("pooled")]
    progress = RunProgress([("", jobs)], 1, clock)
    assert (progress.time_left_s(), progress.describe()) == (None, "0 of 2 jobs done, 2 waiting")
    progress.begin(jobs[0])
    clock.now_s += 2
    progress.advance(jobs[0], "berlin", 0, 200)
    assert progress.time_left_s() is None
    clock.now_s += 2
    progress.advance(jobs[0], "berlin", 100)
    assert progress.time_left_s() is None, "two seconds are too short a time"
    clock.now_s += 2
    progress.advance(jobs[0], "berlin", 160)
    assert progress.time_left_s() == pytest.approx(1 + 5)  # 40 steps a second, and a pooled job like it
    assert progress.describe() == "0 of 2 jobs done, 1 running, 1 waiting; about 10 s left"
    assert progress.running() == ["alone (step 160 of 200)"] and progress.waiting() == ["pooled"]


def test_the_pace_is_that_of_the_kind_where_one_of_it_has_ended(clock: Clock) -> None:
    slow, quick = job("codistilled 0", 300), job("alone 0")
    waiting = [job("codistilled 1", 300), job("alone 1"), job("pooled 1")]
    progress = RunProgress([("", [slow, quick, *waiting])], 1, clock)
    progress.end(slow, 600.0)
    progress.end(quick, 100.0)
    # 2 s for each unit of cost, 1 s, and of the kind that nothing is known of the mean.
    assert progress.time_left_s() == pytest.approx(600 + 100 + 150)
    assert progress.num_finished == 2


def test_jobs_side_by_side_take_as_long_as_the_last_of_them(clock: Clock) -> None:
    measured, wide = job("a 0"), job("a 4", num_cores=2)
    jobs = [measured, job("a 1", 300), job("a 2"), job("a 3"), wide]
    progress = RunProgress([("", jobs)], 2, clock)
    progress.end(measured, 100.0)
    assert progress.time_left_s() == pytest.approx(
        300 + 100
    )  # two short ones beside the long one, then both cores
    progress.begin(jobs[1])
    clock.now_s += 60
    assert progress.time_left_s() == pytest.approx(240 + 100)
    clock.now_s += 1000
    assert progress.time_left_s() == pytest.approx(100 + 100), "what is overdue is about to end"


def test_a_search_comes_first_and_its_pace_serves_what_follows(clock: Clock) -> None:
    trials = [job("alone 0"), job("alone 1")]
    jobs = [job("alone seed 0", 200), job("alone seed 1", 200)]
    progress = RunProgress([("search", trials), ("", jobs)], 2, clock)
    progress.end(trials[0], 50.0)
    progress.begin(trials[1])
    assert progress.time_left_s() == pytest.approx(50 + 100)
    assert progress.describe() == "search: 1 of 2 trials done, 1 running; then 2 jobs; about 2 min left"
    progress.end(trials[1], 50.0)
    assert progress.describe() == "0 of 2 jobs done, 2 waiting; about 2 min left"
    for each in jobs:
        progress.end(each, 100.0)
    assert progress.describe() == "2 of 2 jobs done"


def test_a_job_that_goes_on_is_measured_from_where_it_went_on(clock: Clock) -> None:
    going_on, waiting = job("pair 0"), job("pair 1")
    progress = RunProgress([("", [going_on, waiting])], 1, clock)
    progress.begin(going_on)
    progress.advance(going_on, "berlin", 0, 100)  # its log is read again, at once
    progress.advance(going_on, "berlin", 60)
    clock.now_s += 10
    progress.advance(going_on, "berlin", 80)
    assert progress.time_left_s() == pytest.approx(10 + 50)
    clock.now_s += 10
    progress.end(going_on, 20.0)
    assert progress.time_left_s() == pytest.approx(50), "all of it would have taken 50 s"


def test_a_site_that_is_set_back_does_not_count_twice(clock: Clock) -> None:
    each = job("kills", num_sites=2)
    progress = RunProgress([("", [each])], 1, clock)
    progress.begin(each)
    clock.now_s += 5
    for site in ("berlin", "tokyo"):
        progress.advance(each, site, 40, 100)
    progress.advance(each, "tokyo", 0)
    assert each.share == pytest.approx(0.2)
    clock.now_s += 10
    progress.advance(each, "tokyo", 20)
    assert progress.time_left_s() == pytest.approx(70)


DURATIONS = st.lists(st.tuples(st.floats(1, 100), st.integers(1, 3)), min_size=1, max_size=12)


@given(DURATIONS, st.integers(1, 4))
def test_the_estimate_is_between_what_must_be_and_one_after_the_other(
    durations: list[tuple[float, int]], num_cores: int
) -> None:
    known = job("any")
    jobs = [job(f"any {i}", cost, num_cores=cores) for i, (cost, cores) in enumerate(durations)]
    progress = RunProgress([("", [known, *jobs])], num_cores, Clock())
    progress.end(known, known.cost)
    left_s = progress.time_left_s()
    assert left_s is not None
    work = sum(cost * min(cores, num_cores) for cost, cores in durations)
    least_s = max(work / num_cores, max(cost for cost, _ in durations))
    assert least_s - 1e-6 <= left_s <= sum(cost for cost, _ in durations) + 1e-6


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "10 s"), (44, "40 s"), (89, "90 s"), (91, "2 min"), (12 * 60, "12 min"), (5000, "83 min"), (8000, "2 h 10 min")],
)  # fmt: skip
def test_an_estimate_is_told_as_precisely_as_it_is_worth(seconds: float, told: str) -> None:
    assert about(seconds) == told


def measured(step: int) -> dict[str, Any]:
    return to_record(StepMeasured(step, 1.25, None, 1e-3, 10.0, 0.0, 1.0))


def test_plain_lines_tell_of_jobs_once_a_minute_and_when_one_ends(clock: Clock) -> None:
    jobs = [job("alone, berlin"), job("alone, tokyo"), job("pooled")]
    progress = RunProgress([("", jobs)], 2, clock)
    stream = io.StringIO()
    with PlainView("title", stream, clock) as view:
        progress.end(jobs[2], 100.0)
        view.show_jobs(progress)
        progress.begin(jobs[0])
        view.show_jobs(progress)
        for step in range(1, 19):  # three minutes
            clock.now_s += 10
            progress.advance(jobs[0], "berlin", step, 20)
            view.update("alone", "berlin", measured(step))
        progress.end(jobs[0], 190.0)
        view.show_jobs(progress)
    told = [line for line in stream.getvalue().splitlines() if "jobs done" in line]
    assert told == [
        "1 of 3 jobs done, 2 waiting; about 2 min left",
        "1 of 3 jobs done, 1 running, 1 waiting; about 3 min left; running: alone, berlin (step 6 of 20)",
        "1 of 3 jobs done, 1 running, 1 waiting; about 3 min left; running: alone, berlin (step 12 of 20)",
        "1 of 3 jobs done, 1 running, 1 waiting; about 3 min left; running: alone, berlin (step 18 of 20)",
        "alone, berlin is done; 2 of 3 jobs done, 1 waiting; about 3 min left",
    ]


def test_the_screen_tells_of_jobs_below_the_title(clock: Clock) -> None:
    jobs = [job("alone, a", group="alone"), job("alone, b", group="alone"), job("pooled"), job("pair")]
    progress = RunProgress([("", jobs)], 2, clock)
    progress.end(jobs[3], 100.0)
    lines = [line.plain for line in screen("title", {}, 60, 20, jobs=progress)]
    assert lines[:3] == [
        "title",
        "1 of 4 jobs done, 3 waiting; about 3 min left",
        "waiting: alone (2 jobs), pooled",
    ]
    assert all(len(line.plain) <= 20 for line in screen("title", {}, 20, 20, jobs=progress))
