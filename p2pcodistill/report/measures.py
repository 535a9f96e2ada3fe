"""What is measured of predictions on held-out examples, and of a learning curve; numbers in, numbers out.

Axes of arrays: N examples, the same ones in the same order for every model; C >= 2 classes. A binary task has two classes,
of which the second is the positive one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Probabilities: TypeAlias = NDArray[np.floating[Any]]
Labels: TypeAlias = NDArray[np.integer[Any]]
Measure: TypeAlias = Callable[[Probabilities, Probabilities], float]
"""Of two models' predictions."""

# Below this a probability that was rounded to 0 is taken for this: e^-28.
_LOWEST_PROBABILITY = 1e-12
# Two per cent apart: the loss is flat about its minimum.
_TEMPERATURES = np.geomspace(1 / 8, 8, 211)


# --- two models --------------------------------------------------------------------------------------------------


def churn(probabilities_NC: Probabilities, others_NC: Probabilities) -> float:
    """How far predictions are apart, from 0 to 1: half the L1 distance of two distributions, meaned over examples.

    Of two classes that is the mean absolute difference of the positive one's probability, which is what the paper measures
    (Anil et al. 2018, Table 1); of more, the total variation distance. It is churn if the models are *independent* retrains;
    of models that taught each other it is `diversity`.
    """
    return float(np.abs(_same_shape(probabilities_NC, others_NC)).sum(axis=1).mean() / 2)


def disagreement(probabilities_NC: Probabilities, others_NC: Probabilities) -> float:
    """The share of examples that two models take for different classes, which is called churn, too (arXiv 2102.03349)."""
    _same_shape(probabilities_NC, others_NC)
    return float((probabilities_NC.argmax(axis=1) != others_NC.argmax(axis=1)).mean())


def divergence(probabilities_NC: Probabilities, others_NC: Probabilities) -> float:
    """The mean of the Kullback-Leibler divergences of two models' predictions in both directions, in nats an example."""
    differences_NC = _same_shape(probabilities_NC, others_NC)
    ratios_NC = _log(probabilities_NC) - _log(others_NC)
    return float((differences_NC * ratios_NC).sum(axis=1).mean() / 2)


def pairwise(measure: Measure, models: Sequence[Probabilities]) -> dict[tuple[int, int], float]:
    """`measure` of every two of `models`, by their places: of R retrains, R (R - 1) / 2 figures."""
    return {
        (first, second): measure(models[first], models[second])
        for first, second in itertools.combinations(range(len(models)), 2)
    }


def diversity(models: Sequence[Probabilities], measure: Measure = churn) -> float:
    """How different the models of one codistilling group are at one time: the mean of `measure` over all pairs.

    Codistillation draws models together, and models that are too similar teach each other nothing (Anil et al. 2018, section
    4). Raises ValueError for fewer than two models.
    """
    if len(models) < 2:
        raise ValueError("the diversity of fewer than two models")
    return float(np.mean(list(pairwise(measure, models).values())))


# --- one model ---------------------------------------------------------------------------------------------------


def log_loss(probabilities_NC: Probabilities, labels_N: Labels) -> float:
    """Mean nats an example."""
    return float(-_log(probabilities_NC)[np.arange(len(labels_N)), labels_N].mean())


def calibrated_log_loss(probabilities_NC: Probabilities, labels_N: Labels) -> float:
    """Mean nats an example at the temperature that suits these very examples best (Guo et al. 2017, section 4.2).

    What `log_loss` has on top of it is due to a model that is all in all too sure, or not sure enough. NaN of a model that
    diverged.
    """
    if not np.isfinite(probabilities_NC).all():
        return math.nan
    logits_NC, places_N = _log(probabilities_NC), np.arange(len(labels_N))

    def loss_at(temperature: float) -> float:
        scaled_NC = logits_NC / temperature
        scaled_NC -= scaled_NC.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(scaled_NC).sum(axis=1)) - scaled_NC[places_N, labels_N]))

    return min(map(loss_at, _TEMPERATURES))


def calibration_error(probabilities_NC: Probabilities, labels_N: Labels, *, num_bins: int = 15) -> float:
    """The expected calibration error over bins of equal width, from 0 to 1 (Guo et al. 2017, section 2).

    Examples are binned by a predicted probability, and of each bin counts how far the mean prediction is from what came
    true. Of two classes that is the positive one's probability, and how often it was the label; of more, the probability of
    the most likely class, and how often that was right. NaN of a model that diverged.
    """
    if not np.isfinite(probabilities_NC).all():
        return math.nan
    if probabilities_NC.shape[1] == 2:
        confidence_N, outcome_N = probabilities_NC[:, 1], labels_N == 1
    else:
        confidence_N, outcome_N = probabilities_NC.max(axis=1), probabilities_NC.argmax(axis=1) == labels_N
    bins_N = np.minimum((confidence_N * num_bins).astype(np.int64), num_bins - 1)
    excess_by_bin = np.bincount(bins_N, confidence_N.astype(np.float64) - outcome_N, minlength=num_bins)
    return float(np.abs(excess_by_bin).sum() / len(labels_N))


# --- a learning curve --------------------------------------------------------------------------------------------


def steps_to_loss(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """The step at which a curve of (step, held-out loss) first comes down to `loss`, or None if it never does.

    From an evaluation that is above to the next one, which is not, the curve is taken for a straight line: the figure is not
    bound to how often was evaluated. After an evaluation that is not finite, the step of the next one counts.
    """
    above: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if above is None:
                return float(step)
            earlier_step, earlier_value = above
            return earlier_step + (step - earlier_step) * (earlier_value - loss) / (earlier_value - value)
        above = (step, value) if math.isfinite(value) else None
    return None


def _same_shape(probabilities_NC: Probabilities, others_NC: Probabilities) -> NDArray[np.float64]:
    """Their difference. Raises ValueError if they are not of the same examples and classes."""
    if probabilities_NC.shape != others_NC.shape or probabilities_NC.ndim != 2:
        raise ValueError(f"predictions of the shapes {probabilities_NC.shape} and {others_NC.shape}")
    difference_NC: NDArray[np.float64] = probabilities_NC.astype(np.float64) - others_NC
    return difference_NC


def _log(probabilities_NC: Probabilities) -> NDArray[np.float64]:
    logs_NC: NDArray[np.float64] = np.log(
        np.maximum(probabilities_NC.astype(np.float64), _LOWEST_PROBABILITY)
    )
    return logs_NC
