"""Generated clicks: like Criteo's, and of exactly the probability that is said."""

from __future__ import annotations

import subprocess
import sys
import zlib

import numpy as np
import pytest

from p2pcodistill.report.measures import calibration_error
from p2pcodistill.tasks.click_files import NUM_CATEGORIES, NUM_DENSE, NUM_INTEGERS, Clicks
from p2pcodistill.tasks.click_generator import CLICK_RATE, generate_clicks

NUM_BUCKETS = 500


@pytest.fixture(scope="module")
def clicks() -> Clicks:
    return generate_clicks(20_000, seed=0, num_buckets=NUM_BUCKETS)


def truth_of(clicks: Clicks) -> np.ndarray:
    assert clicks.truth_N is not None
    return clicks.truth_N


def test_they_have_the_form_of_clicks_that_are_read(clicks: Clicks) -> None:
    assert len(clicks) == 20_000
    assert clicks.dense_ND.shape == (20_000, NUM_DENSE) and clicks.dense_ND.dtype == np.float32
    assert clicks.buckets_NK.shape == (20_000, NUM_CATEGORIES) and clicks.buckets_NK.dtype == np.int32
    assert np.isfinite(clicks.dense_ND).all() and clicks.dense_ND.min() == 0
    values_NI, flags_NI = np.split(clicks.dense_ND, 2, axis=1)
    assert set(np.unique(flags_NI)) == {0, 1} and not values_NI[flags_NI == 1].any()
    columns = clicks.buckets_NK // NUM_BUCKETS
    assert (columns == np.arange(NUM_CATEGORIES)).all()
    assert set(np.unique(clicks.labels_N)) == {0, 1}


def test_labels_come_true_as_often_as_the_truth_says(clicks: Clicks) -> None:
    truth_N = truth_of(clicks)
    assert abs(truth_N.mean() - CLICK_RATE) < 0.01
    assert abs(clicks.labels_N.mean() - truth_N.mean()) < 0.01
    assert calibration_error(np.stack([1 - truth_N, truth_N], 1), clicks.labels_N) < 0.015


def test_the_entropy_of_the_truth_leaves_much_to_chance_and_something_to_learn(clicks: Clicks) -> None:
    truth_N = truth_of(clicks)
    entropy = -(truth_N * np.log(truth_N) + (1 - truth_N) * np.log(1 - truth_N)).mean()
    assert 0.36 < entropy < 0.40


def test_categories_have_a_head_and_a_long_tail(clicks: Clicks) -> None:
    counts = np.sort(np.bincount(clicks.buckets_NK[:, -1] % NUM_BUCKETS, minlength=NUM_BUCKETS))[::-1]
    assert counts[0] > 0.1 * len(clicks)
    assert (counts < 0.002 * len(clicks)).sum() > 0.8 * NUM_BUCKETS
    assert (counts > 0).sum() > 0.7 * NUM_BUCKETS


def test_single_features_tell_something_but_little(clicks: Clicks) -> None:
    explained = []
    for column in range(NUM_CATEGORIES):
        buckets_N = clicks.buckets_NK[:, column] % NUM_BUCKETS
        counts = np.maximum(np.bincount(buckets_N, minlength=NUM_BUCKETS), 1)
        means = np.bincount(buckets_N, truth_of(clicks), minlength=NUM_BUCKETS) / counts
        explained.append(means[buckets_N].var() / truth_of(clicks).var())
    assert 0.01 < np.median(explained) < 0.2 and max(explained) < 0.4


def test_some_values_are_missing_more_often_in_some_columns(clicks: Clicks) -> None:
    missing_I = clicks.dense_ND[:, NUM_INTEGERS:].mean(axis=0)
    missing_K = (clicks.buckets_NK % NUM_BUCKETS == 0).mean(axis=0)
    for missing in (missing_I, missing_K):
        assert missing.min() < 0.05 and 0.2 < missing.max() < 0.6


def test_the_seed_is_all_that_decides() -> None:
    first, again, other = (generate_clicks(300, seed=seed, num_buckets=50) for seed in (3, 3, 4))
    assert np.array_equal(first.dense_ND, again.dense_ND) and np.array_equal(first.labels_N, again.labels_N)
    assert np.array_equal(truth_of(first), truth_of(again))
    assert not np.array_equal(first.buckets_NK, other.buckets_NK)


def test_another_process_generates_the_same() -> None:
    program = (
        "import zlib; from p2pcodistill.tasks.click_generator import generate_clicks as generate\n"
        "clicks = generate(200, seed=1, num_buckets=50); print(zlib.crc32(clicks.buckets_NK.tobytes()))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert int(printed) == zlib.crc32(generate_clicks(200, seed=1, num_buckets=50).buckets_NK.tobytes())


def test_fewer_buckets_change_the_view_of_the_world_and_not_the_world() -> None:
    fine, coarse = (generate_clicks(300, seed=3, num_buckets=num_buckets) for num_buckets in (2000, 2))
    assert np.array_equal(truth_of(fine), truth_of(coarse))
    assert set(np.unique(coarse.buckets_NK % 2)) == {0, 1}
