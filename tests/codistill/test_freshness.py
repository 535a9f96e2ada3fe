"""Staleness, age, limits and weights, against values worked out by hand."""

from __future__ import annotations

import pytest

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.codistill.freshness import (
    MAX_HEARD_VERSIONS,
    AgeClock,
    Freshness,
    Limits,
    find_excess,
    staleness_steps,
    weigh_by_age,
)
from p2pcodistill.config import CodistillationConfig


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("newest", "in_use", "steps"),
    [
        (Version(0, 150), Version(0, 100), 50),
        (Version(0, 100), Version(0, 100), 0),
        (Version(2, 40), Version(1, 100), 0),
        (Version(2, 140), Version(1, 100), 40),
    ],
)
def test_staleness_is_what_was_missed_and_never_negative(
    newest: Version, in_use: Version, steps: int
) -> None:
    assert staleness_steps(newest, in_use) == steps


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, None),
        ({"max_staleness_steps": 50, "max_age_s": 30.0}, None),
        ({"max_staleness_steps": 49}, "50 steps behind what it announced, and the limit is 49"),
        ({"max_age_s": 29.5}, "30 s old, and the limit is 29.5 s"),
    ],
)
def test_a_limit_is_over_when_it_is_exceeded(config: dict[str, float], why: str | None) -> None:
    assert find_excess(CodistillationConfig(**config), Freshness(50, 30.0)) == why


def test_a_revoked_teacher_is_over_every_limit_until_it_is_restored() -> None:
    limits = Limits(CodistillationConfig())
    version = Version(1, 50)
    assert limits.note("tokyo", version, Freshness()) is None
    why = limits.note("tokyo", version, Freshness(), is_revoked=True)
    assert why is not None and "revoked" in why and limits.expired == {"tokyo"}
    assert limits.note("tokyo", version, Freshness(), is_revoked=True) is None, "it is told once"
    assert limits.note("tokyo", version, Freshness()) is None and not limits.expired


def test_a_weight_halves_for_each_half_life_and_the_rest_adds_up_to_one() -> None:
    weights, ages_s = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 5.0}, {"a": 10.0, "b": 70.0, "c": 130.0}
    # Halved 0, 1 and 2 times: 1, 1/2 and 2/4.
    assert weigh_by_age(weights, ages_s, 60.0) == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})
    assert weigh_by_age(weights, ages_s, None) == {"a": 0.25, "b": 0.25, "c": 0.5}
    # A third of a half-life: 2 ** (-1/3) = 0.7937005.
    two = weigh_by_age({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 20.0}, 60.0)
    assert two == pytest.approx({"a": 1 / 1.7937005, "b": 0.7937005 / 1.7937005})


def test_only_differences_of_age_count_however_old_all_are() -> None:
    weights, half_life_s = {"a": 1.0, "b": 3.0}, 1.0
    assert weigh_by_age(weights, {"a": 1e9, "b": 1e9 + 1}, half_life_s) == pytest.approx({"a": 0.4, "b": 0.6})
    assert weigh_by_age(weights, {"a": 0.0, "b": 1e9}, half_life_s) == {"a": 1.0, "b": 0.0}
    assert weigh_by_age(weights, {"b": 1e9}, half_life_s) == {"b": 1.0}
    assert weigh_by_age(weights, {}, half_life_s) == {}


def test_an_age_begins_with_the_announcement_and_goes_on_when_nothing_is_heard() -> None:
    clock = Clock()
    ages = AgeClock(clock)
    ages.hear({"tokyo": Version(0, 50)})
    clock.now_s += 10
    ages.hear({"tokyo": Version(0, 50)})  # the same once more
    assert ages.age_s("tokyo", Version(0, 50)) == 10
    clock.now_s += 5
    ages.hear({"tokyo": Version(0, 100)})
    clock.now_s += 3
    assert (ages.age_s("tokyo", Version(0, 50)), ages.age_s("tokyo", Version(0, 100))) == (18, 3)
    assert ages.age_s("tokyo", None) == ages.age_s("oslo", Version(0, 50)) == 0


def test_a_version_that_was_overtaken_unseen_is_as_old_as_what_overtook_it() -> None:
    clock = Clock()
    ages = AgeClock(clock)
    ages.hear({"tokyo": Version(0, 150)})
    clock.now_s += 7
    assert ages.age_s("tokyo", Version(0, 100)) == 7
    assert ages.age_s("tokyo", Version(1, 0)) == 0, "nothing is known of it"


def test_a_new_incarnation_is_newer_whatever_its_step() -> None:
    clock = Clock()
    ages = AgeClock(clock)
    ages.hear({"tokyo": Version(0, 150)})
    clock.now_s += 7
    ages.hear({"tokyo": Version(1, 10)})
    clock.now_s += 1
    assert (ages.age_s("tokyo", Version(0, 150)), ages.age_s("tokyo", Version(1, 10))) == (8, 1)


def test_a_restart_makes_nobody_young_and_its_own_duration_does_not_count() -> None:
    clock = Clock()
    ages = AgeClock(clock)
    ages.hear({"tokyo": Version(0, 50)})
    clock.now_s += 40
    saved = ages.state_dict()
    restarted_clock = Clock(3.0)  # a rebooted machine counts from anew
    restarted = AgeClock(restarted_clock)
    restarted.load_state_dict(saved)
    restarted.hear({"tokyo": Version(0, 100)})  # came while nobody trained
    restarted_clock.now_s += 2
    assert restarted.age_s("tokyo", Version(0, 50)) == pytest.approx(42)
    assert restarted.age_s("tokyo", Version(0, 100)) == pytest.approx(2)


def test_of_two_ages_the_larger_one_counts() -> None:
    clock = Clock()
    ages = AgeClock(clock)
    ages.load_state_dict({"tokyo": [[0, 50, 10.0], [0, 100, 4.0]]})
    clock.now_s += 1
    heard = {Version(0, 100): 3.0, Version(0, 150): 2.0, Version(0, 200): 0.5}
    ages.hear({"tokyo": Version(0, 200)}, {"tokyo": heard, "oslo": {Version(1, 0): 9.0}})
    clock.now_s += 100
    assert [ages.age_s("tokyo", Version(0, step)) for step in (50, 100, 150, 200)] == [111, 105, 102, 100.5]
    assert ages.age_s("oslo", Version(1, 0)) == 109
    ages.hear({}, {"tokyo": {Version(0, 150): 500.0}})
    assert [ages.age_s("tokyo", Version(0, step)) for step in (100, 150, 200)] == [500, 500, 100.5]


def test_what_is_remembered_is_bounded_and_the_version_in_use_stays_known() -> None:
    clock = Clock(0.0)
    ages = AgeClock(clock)
    num_versions = 10 * MAX_HEARD_VERSIONS
    for step in range(num_versions):
        clock.now_s = float(step)
        ages.hear({"tokyo": Version(0, step)})
    assert len(ages.state_dict()["tokyo"]) <= MAX_HEARD_VERSIONS
    assert ages.age_s("tokyo", Version(0, 0)) == num_versions - 1
    assert ages.age_s("tokyo", Version(0, num_versions - 1)) == 0
    ages.forget("tokyo", Version(0, num_versions - 2))
    assert [step for _, step, _ in ages.state_dict()["tokyo"]][-1] == num_versions - 1
    assert len(ages.state_dict()["tokyo"]) <= 2
    few = AgeClock(clock, max_versions=4)
    few.hear({}, {"tokyo": {Version(0, step): 100.0 - step for step in range(100)}})
    assert 2 <= len(few.ages_s("tokyo")) <= 4
    assert (few.age_s("tokyo", Version(0, 0)), few.age_s("tokyo", Version(0, 99))) == (100, 1)
