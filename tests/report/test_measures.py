"""Measures of predictions and curves, by hand and by their laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.report.measures import (
    Probabilities,
    calibration_error,
    churn,
    disagreement,
    divergence,
    diversity,
    log_loss,
    pairwise,
    steps_to_loss,
)


def binary(*clicks: float) -> Probabilities:
    return np.array([[1 - p, p] for p in clicks], np.float32)


@st.composite
def two_models(draw: st.DrawFn) -> tuple[Probabilities, Probabilities]:
    shape = draw(st.tuples(st.just(2), st.integers(1, 6), st.integers(2, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    first, second = rng.dirichlet(np.ones(shape[2]), shape[:2])
    return first, second


# --- two models --------------------------------------------------------------------------------------------------


def test_churn_of_two_classes_is_the_mean_absolute_difference_of_the_positive_one() -> None:
    assert churn(binary(0.1, 0.5, 0.9), binary(0.2, 0.5, 0.7)) == pytest.approx(0.1)


def test_churn_of_more_classes_is_half_the_l1_distance() -> None:
    first = np.array([[1.0, 0, 0], [0.2, 0.3, 0.5]])
    second = np.array([[0, 1.0, 0], [0.3, 0.3, 0.4]])
    assert churn(first, second) == pytest.approx((1 + 0.1) / 2)


def test_disagreement_counts_other_classes_only() -> None:
    assert disagreement(binary(0.1, 0.4, 0.9, 0.6), binary(0.4, 0.6, 0.6, 0.4)) == 0.5


def test_divergence_is_the_mean_of_both_directions() -> None:
    first, second = binary(0.5), binary(0.25)
    forth = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    back = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert divergence(first, second) == pytest.approx((forth + back) / 2)


def test_a_probability_of_zero_makes_a_large_divergence_and_no_infinite_one() -> None:
    assert 10 < divergence(binary(0.0), binary(1.0)) < 30


@given(two_models())
def test_differences_of_models_are_symmetric_bounded_and_none_of_a_model_to_itself(
    models: tuple[Probabilities, Probabilities],
) -> None:
    first, second = models
    for measure in (churn, disagreement, divergence):
        assert measure(first, second) == pytest.approx(measure(second, first))
        assert measure(first, second) >= 0
        assert measure(first, first) == 0
    assert churn(first, second) <= 1
    # Pinsker's inequality, for both directions.
    assert divergence(first, second) >= 2 * churn(first, second) ** 2 - 1e-9


def test_every_two_retrains_make_a_figure() -> None:
    models = [binary(0.1), binary(0.2), binary(0.4)]
    assert pairwise(churn, models) == pytest.approx({(0, 1): 0.1, (0, 2): 0.3, (1, 2): 0.2})
    assert diversity(models) == pytest.approx(0.2)
    assert diversity(models, disagreement) == 0


def test_predictions_of_other_examples_are_not_compared() -> None:
    for measure in (churn, disagreement, divergence):
        with pytest.raises(ValueError, match=r"the shapes \(2, 2\) and \(1, 2\)"):
            measure(binary(0.1, 0.2), binary(0.1))
    with pytest.raises(ValueError, match="fewer than two"):
        diversity([binary(0.1)])


# --- one model ---------------------------------------------------------------------------------------------------


def test_log_loss_is_the_mean_of_what_was_said_of_the_label() -> None:
    loss = log_loss(binary(0.25, 0.5), np.array([0, 1]))
    assert loss == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)


def test_calibration_of_two_classes_is_of_the_positive_one() -> None:
    # Two bins: 0.1 and 0.3 with one click of two, 0.9 with a click.
    probabilities, labels = binary(0.1, 0.3, 0.9), np.array([0, 1, 1])
    expected = (2 * abs(0.2 - 0.5) + 1 * abs(0.9 - 1)) / 3
    assert calibration_error(probabilities, labels, num_bins=2) == pytest.approx(expected)


def test_calibration_of_more_classes_is_of_the_most_likely_one() -> None:
    probabilities = np.array([[0.6, 0.2, 0.2], [0.1, 0.1, 0.8]])
    assert calibration_error(probabilities, np.array([0, 0]), num_bins=10) == pytest.approx((0.4 + 0.8) / 2)


def test_certainty_falls_into_the_last_bin() -> None:
    assert calibration_error(binary(1.0, 1.0), np.array([1, 0]), num_bins=5) == pytest.approx(0.5)


def test_a_model_that_says_true_probabilities_is_calibrated_and_a_confident_one_is_not() -> None:
    rng = np.random.default_rng(0)
    truth_N = rng.random(40_000)
    labels_N = (rng.random(40_000) < truth_N).astype(int)
    assert calibration_error(binary(*truth_N), labels_N) < 0.01
    assert calibration_error(binary(*truth_N.round()), labels_N) > 0.2


# --- a learning curve --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "steps"), [(3.0, 100.0), (2.5, 150.0), (2.0, 200.0), (1.25, 275.0), (1.0, 300.0), (0.9, None)]
)
def test_steps_to_a_loss_lie_between_evaluations(loss: float, steps: float | None) -> None:
    assert steps_to_loss([(100, 3.0), (200, 2.0), (300, 1.0), (400, 1.5)], loss) == steps


def test_the_first_time_counts() -> None:
    assert steps_to_loss([(100, 2.0), (200, 1.0), (300, 2.0), (400, 1.0)], 1.5) == 150


def test_no_line_is_drawn_from_an_evaluation_that_is_not_finite() -> None:
    for lost in (math.nan, math.inf):
        assert steps_to_loss([(100, 2.0), (200, lost), (300, 1.0)], 1.5) == 300
        assert steps_to_loss([(100, lost)], 1.5) is None
