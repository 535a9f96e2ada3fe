"""Clicks whose true probability is known, so that the excess of a log loss over the lowest possible one is known exactly.

They look like Criteo's: the same columns, categories by a power law with up to a thousand values a column, counts that
spread over decades, missing values, one click in four. What decides a click is a random function of them, the *world*: a
weight for each category, products of what pairs of categories stand for, and waves over the logarithms of the integers.

Axes of arrays: N examples, I integers, K categories, F factors of a pair.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from p2pcodistill.tasks.click_files import (
    NUM_CATEGORIES,
    NUM_INTEGERS,
    Clicks,
    bucket_of,
    transform_integers,
)

CLICK_RATE = 0.256
"""The share of clicks, as in Criteo's data."""
LOGIT_SPREAD = 2.0
"""The standard deviation of the true logit. The truth has an entropy of 0.38 nats, and a small network that has seen 70,000
examples a log loss of 0.45, which is what large ones have on Criteo's data (Anil et al. 2018, Table 1)."""

_NUM_VALUES_K = tuple(int(number) for number in np.geomspace(3, 1000, NUM_CATEGORIES))
_POWER = 1.1
_MAX_MISSING_SHARE = 0.5
_NUM_PAIRS, _NUM_FACTORS = 24, 4
# Of the variance of the logit: weights of categories, pairs of categories, waves over integers.
_SHARES = (0.6, 0.25, 0.15)
_NUM_CALIBRATION_EXAMPLES = 20_000

_Floats: TypeAlias = NDArray[np.float64]
_Values: TypeAlias = NDArray[np.int64]


def generate_clicks(num_examples: int, *, seed: int, num_buckets: int) -> Clicks:
    """`num_examples` of the world of `seed`, with categories hashed into `num_buckets` a column.

    The same arguments lead to the same examples wherever numpy is the same.
    """
    world = _World(np.random.default_rng([seed, 0]))
    rng = np.random.default_rng([seed, 1])
    integers_NI, values_NK = world.draw(num_examples, rng)
    truth_N = world.probability(integers_NI, values_NK)
    labels_N = (rng.random(num_examples) < truth_N).astype(np.uint8)
    buckets_NK = np.empty(values_NK.shape, np.int32)
    for column, num_values in enumerate(_NUM_VALUES_K):
        names = [b"", *(b"%d" % value for value in range(1, num_values + 1))]
        table = np.array([bucket_of(name, column, num_buckets) for name in names], np.int32)
        buckets_NK[:, column] = table[values_NK[:, column]]
    return Clicks(transform_integers(integers_NI), buckets_NK, labels_N, truth_N)


class _World:
    """What examples are like, and what decides a click."""

    def __init__(self, rng: np.random.Generator) -> None:
        # Most columns are nearly complete, a few are not.
        self._missing_share_I = _MAX_MISSING_SHARE * rng.random(NUM_INTEGERS) ** 2
        self._missing_share_K = _MAX_MISSING_SHARE * rng.random(NUM_CATEGORIES) ** 2
        self._log_mean_I = rng.uniform(0.5, 5, NUM_INTEGERS)
        self._log_spread_I = rng.uniform(0.5, 2, NUM_INTEGERS)
        self._weights_K = [rng.standard_normal(1 + num_values) for num_values in _NUM_VALUES_K]
        self._pairs = [rng.permutation(NUM_CATEGORIES)[:2].tolist() for _ in range(_NUM_PAIRS)]
        self._factors = [
            [rng.standard_normal((1 + _NUM_VALUES_K[column], _NUM_FACTORS)) for column in pair]
            for pair in self._pairs
        ]
        self._frequency_I = rng.uniform(0.5, 2, NUM_INTEGERS)
        self._phase_I = rng.uniform(0, 2 * np.pi, NUM_INTEGERS)
        self._missing_weight_I = rng.standard_normal(NUM_INTEGERS)
        parts = self._parts(*self.draw(_NUM_CALIBRATION_EXAMPLES, rng))
        self._scale = np.sqrt(_SHARES) * LOGIT_SPREAD / parts.std(axis=1)
        self._bias = _bias_for(CLICK_RATE, self._scale @ parts)

    def draw(self, num_examples: int, rng: np.random.Generator) -> tuple[_Floats, _Values]:
        """(integers_NI, NaN where missing; values_NK from 1, 0 where missing)."""
        integers_NI = np.empty((num_examples, NUM_INTEGERS))
        for i in range(NUM_INTEGERS):
            logs_N = self._log_mean_I[i] + self._log_spread_I[i] * rng.standard_normal(num_examples)
            is_missing_N = rng.random(num_examples) < self._missing_share_I[i]
            integers_NI[:, i] = np.where(is_missing_N, np.nan, np.floor(np.exp(logs_N)))
        values_NK = np.empty((num_examples, NUM_CATEGORIES), np.int64)
        for k, num_values in enumerate(_NUM_VALUES_K):
            cumulated = np.cumsum(np.arange(1, num_values + 1) ** -_POWER)
            places_N = rng.random(num_examples) * cumulated[-1]
            values_NK[:, k] = 1 + np.searchsorted(cumulated[:-1], places_N, side="right")
            values_NK[rng.random(num_examples) < self._missing_share_K[k], k] = 0
        return integers_NI, values_NK

    def probability(self, integers_NI: _Floats, values_NK: _Values) -> _Floats:
        """Of a click, for each example."""
        return _sigmoid(self._bias + self._scale @ self._parts(integers_NI, values_NK))

    def _parts(self, integers_NI: _Floats, values_NK: _Values) -> _Floats:
        """What weights, pairs and waves contribute to the logits of N examples, unscaled: an array of 3 x N."""
        weights_N, pairs_N, waves_N = parts = np.zeros((3, len(values_NK)))
        for k, weights in enumerate(self._weights_K):
            weights_N += weights[values_NK[:, k]]
        for (first, second), (factors, other_factors) in zip(self._pairs, self._factors, strict=True):
            pairs_N += np.einsum(
                "nf,nf->n", factors[values_NK[:, first]], other_factors[values_NK[:, second]]
            )
        logs_NI = np.log1p(np.nan_to_num(integers_NI))
        waves_NI = np.sin(self._frequency_I * logs_NI + self._phase_I)
        waves_N += np.where(np.isnan(integers_NI), self._missing_weight_I, waves_NI).sum(axis=1)
        return parts


def _bias_for(rate: float, logits_N: _Floats) -> float:
    """What to add to the logits, so that the mean probability is `rate`: by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if _sigmoid(middle + logits_N).mean() < rate:
            low = middle
        else:
            high = middle
    return low


def _sigmoid(logits_N: _Floats) -> _Floats:
    return 1 / (1 + np.exp(-logits_N))
