"""Waits between dials: uniform below a cap that doubles, the same for the same seed."""

from __future__ import annotations

import random
import statistics

from p2pcodistill.transport.backoff import Backoff


def test_waits_are_uniform_between_nothing_and_a_cap_that_doubles() -> None:
    backoffs = [Backoff(0.1, 5.0, random.Random(seed)) for seed in range(2000)]
    for cap_s in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0):
        waits_s = [backoff.next_s() for backoff in backoffs]
        assert 0.0 <= min(waits_s) < 0.01 * cap_s
        assert 0.99 * cap_s < max(waits_s) <= cap_s
        assert abs(statistics.mean(waits_s) - cap_s / 2) < 0.03 * cap_s


def test_success_starts_over_and_a_seed_decides() -> None:
    one, other = (Backoff(0.1, 5.0, random.Random(7)) for _ in range(2))
    assert [one.next_s() for _ in range(20)] == [other.next_s() for _ in range(20)]
    one.reset()
    assert one.next_s() <= 0.1
