"""Some seconds of what `make soak` does for hours."""

from __future__ import annotations

import pytest
from integration.conftest import Sites
from integration.endurance import SLACK, Sample, exchange_for_long, require_level


async def test_exchanges_without_end_take_no_more_and_no_more(sites: Sites) -> None:
    assert await exchange_for_long(sites, 6.0, exchanges_per_s=8.0) > 20


@pytest.mark.parametrize("what", SLACK)
def test_growth_is_noticed(what: str) -> None:
    level = Sample(10**9, 100, 10**7)
    require_level("berlin", [level] * 30)
    growing = [
        Sample(**(vars(level) | {what: round(getattr(level, what) * (1 + step / 30))})) for step in range(30)
    ]
    with pytest.raises(AssertionError, match=f"{what} of berlin grows"):
        require_level("berlin", growing)
