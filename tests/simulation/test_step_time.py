"""Durations of updates: what they are drawn from, and that the slowest of many is slow."""

from __future__ import annotations

import math
import statistics

import pytest

from p2pcodistill.simulation.scenario_tables import VirtualConfig
from p2pcodistill.simulation.virtual.step_time import StepTimes

NUM_DRAWS = 4000


def draws(
    tail: str, *, spread: float = 0.5, num_workers: int = 1, site: str = "a", seed: int = 0
) -> list[float]:
    config = VirtualConfig.model_validate(
        {"step_time_s": 0.2, "step_time_tail": tail, "step_time_spread": spread}
    )
    times = StepTimes(config, seed=seed, num_workers=num_workers)
    return [times(site) for _ in range(NUM_DRAWS)]


def test_without_a_tail_all_take_the_same() -> None:
    assert set(draws("none", num_workers=8)) == {0.2}


def test_a_lognormal_tail_has_its_median_and_spread() -> None:
    logarithms = [math.log(duration_s) for duration_s in draws("lognormal")]
    assert statistics.median(logarithms) == pytest.approx(math.log(0.2), abs=0.05)
    assert statistics.stdev(logarithms) == pytest.approx(0.5, rel=0.05)


def test_an_exponential_tail_has_its_least_and_mean() -> None:
    durations_s = draws("exponential")
    assert 0.2 <= min(durations_s) < 0.201
    assert statistics.mean(durations_s) == pytest.approx(0.2 * 1.5, rel=0.05)


def test_of_several_workers_the_slowest_decides() -> None:
    # The mean of the largest of n exponential draws is the harmonic number of n.
    for num_workers in (1, 4, 16):
        harmonic = sum(1 / k for k in range(1, num_workers + 1))
        mean_s = statistics.mean(draws("exponential", num_workers=num_workers))
        assert mean_s == pytest.approx(0.2 * (1 + 0.5 * harmonic), rel=0.03)


def test_teachers_make_an_update_longer_by_a_share_of_it() -> None:
    assert StepTimes(VirtualConfig(), seed=0)("a", num_teachers=3) == pytest.approx(0.1 * (1 + 3 / 3))
    table = {"step_time_tail": "lognormal", "teacher_time_ratio": 0.25}
    times = [StepTimes(VirtualConfig.model_validate(table), seed=0) for _ in range(2)]
    assert times[0]("a", num_teachers=2) == pytest.approx(times[1]("a") * 1.5)
    free = VirtualConfig(teacher_time_ratio=0.0)
    assert StepTimes(free, seed=0)("a", num_teachers=3) == 0.1


def test_seed_and_site_decide_what_is_drawn() -> None:
    assert draws("lognormal") == draws("lognormal")
    assert draws("lognormal") != draws("lognormal", site="b")
    assert draws("lognormal") != draws("lognormal", seed=1)
