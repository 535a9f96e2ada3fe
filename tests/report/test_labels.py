from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.report.labels import spread_apart

POSITIONS = st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=12).map(sorted)


@given(POSITIONS)
def test_spread_apart_keeps_order_distance_and_bounds(positions):
    spread = spread_apart(positions, gap=0.05, low=0.0, high=1.0)
    assert len(spread) == len(positions)
    assert all(after - before >= 0.05 - 1e-9 for before, after in pairwise(spread))
    assert spread[0] - 0.025 >= -1e-9 and spread[-1] + 0.025 <= 1 + 1e-9


def test_spread_apart_moves_only_what_is_too_close():
    assert spread_apart([0.2, 0.49, 0.51, 0.9], gap=0.1, low=0.0, high=1.0) == pytest.approx(
        [0.2, 0.45, 0.55, 0.9]
    )
