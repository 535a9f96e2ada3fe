"""Figures over seeds and verdicts on claims."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.report.verdicts import (
    VERDICTS,
    Claim,
    Spread,
    Verdict,
    judge,
    paired_differences,
    paired_ratios,
    spread_of,
    worst_of,
)

FEWER_STEPS = Claim("fewer steps to the baseline's loss", bound=0.55, side="at most", no_effect=1.0)
LESS_CHURN = Claim("less churn", bound=0.3, side="at least", no_effect=0.0)


def test_a_figure_is_the_mean_with_half_the_range() -> None:
    spread = spread_of([1.0, 2.0, 6.0])
    assert spread == Spread(3.0, 1.0, 6.0, 3)
    assert spread.half_range == 2.5
    assert spread_of([0.4]).half_range == 0


@pytest.mark.parametrize("figures", [[], [1.0, math.nan], [math.inf]])
def test_there_is_no_figure_of_a_run_that_diverged(figures: list[float]) -> None:
    with pytest.raises(ValueError, match="the spread of"):
        spread_of(figures)


def test_arms_are_compared_seed_by_seed() -> None:
    figures, baseline = {0: 1.5, 1: 3.0}, {1: 4.0, 0: 2.0}
    assert paired_differences(figures, baseline) == {0: -0.5, 1: -1.0}
    assert paired_ratios(figures, baseline) == {0: 0.75, 1: 0.75}
    # What differs from seed to seed, but not between the arms, is no spread.
    assert spread_of(paired_ratios(figures, baseline).values()).half_range == 0


def test_arms_with_other_seeds_are_not_compared() -> None:
    for pair in (paired_differences, paired_ratios):
        with pytest.raises(ValueError, match=r"without a counterpart: 1, 2$"):
            pair({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0})


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ([0.5, 0.6], "reproduced"),
        ([0.5, 0.62], "not at this scale"),
        ([0.9, 1.3], "not at this scale"),
        ([1.0, 1.3], "contradicted"),
    ],
)
def test_a_figure_is_held_against_a_bound_from_above(figures: list[float], verdict: Verdict) -> None:
    assert judge(FEWER_STEPS, spread_of(figures)) == verdict


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ([0.2, 0.4], "reproduced"),
        ([0.1, 0.2], "not at this scale"),
        ([-0.2, 0.1], "not at this scale"),
        ([-0.2, -0.1], "contradicted"),
    ],
)
def test_a_figure_is_held_against_a_bound_from_below(figures: list[float], verdict: Verdict) -> None:
    assert judge(LESS_CHURN, spread_of(figures)) == verdict


def test_beyond_the_spread_every_seed_counts() -> None:
    worse = Claim("worse", bound=0.0, side="at least", no_effect=0.0, beyond_spread=True)
    assert judge(worse, spread_of([0.01, 0.02])) == "reproduced"
    assert judge(worse, spread_of([-0.01, 0.05])) == "not at this scale"
    assert judge(worse, spread_of([-0.02, -0.01])) == "contradicted"


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=4), st.floats(-2, 2), st.floats(-1, 1))
def test_a_claim_and_its_mirror_image_are_judged_alike(
    figures: list[float], bound: float, no_effect: float
) -> None:
    claim = Claim("", bound=bound, side="at least", no_effect=no_effect)
    mirrored = Claim("", bound=-bound, side="at most", no_effect=-no_effect)
    assert judge(claim, spread_of(figures)) == judge(mirrored, spread_of([-figure for figure in figures]))


def test_a_claim_of_several_parts_is_as_good_as_the_worst() -> None:
    assert worst_of(["reproduced", "reproduced"]) == "reproduced"
    assert worst_of(VERDICTS) == "contradicted"
    assert worst_of(["not at this scale", "reproduced"]) == "not at this scale"


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [([0.03, 0.04], "contradicted"), ([0.01, 0.04], "not at this scale"), ([0.01, 0.02], "reproduced")],
)
def test_a_claim_that_allows_for_worse_is_contradicted_where_no_seed_keeps_to_it(
    figures: list[float], verdict: str
) -> None:
    assert (
        judge(Claim("costs little", bound=0.02, side="at most", no_effect=0.0), spread_of(figures)) == verdict
    )
